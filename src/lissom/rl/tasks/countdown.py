"""Countdown: reach a number from a few others by the four operations, each used once at most.

Divisions must come out even and nothing may go below 0, as in the game. Problems are split by the *multiset* of their
numbers: an order, or another target, of numbers that were trained on is never measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import NamedTuple

import numpy as np

from lissom.errors import UserError
from lissom.models.method import check_types
from lissom.rl.tasks.expressions import NotArithmetic, evaluate
from lissom.rl.tasks.task import NumberTask, Prompt, Style, answer_of, held_out

LARGEST_TARGET = 99


class Move(NamedTuple):
    """One operation on two of the numbers that are left."""

    left: int
    operation: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operation}{self.right}={self.result}"


@dataclass(frozen=True)
class CountdownProblem:
    """Numbers, in the order in which they are shown, and what is to be reached."""

    numbers: tuple[int, ...]
    target: int


def moves(numbers: Sequence[int]) -> Iterator[tuple[Move, tuple[int, ...]]]:
    """Every legal operation on two of `numbers`, each once, with the sorted numbers that are left behind it."""
    seen: set[tuple[int, int]] = set()
    for i, j in combinations(range(len(numbers)), 2):
        high, low = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        if (high, low) in seen:
            continue
        seen.add((high, low))
        rest = [n for place, n in enumerate(numbers) if place not in (i, j)]
        found = [Move(low, "+", high, low + high), Move(low, "*", high, low * high), Move(high, "-", low, high - low)]
        if low > 0 and high % low == 0:
            found.append(Move(high, "/", low, high // low))
        for move in found:
            yield move, tuple(sorted([*rest, move.result]))


@cache
def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Every number that some operations on some of `numbers`, sorted, give."""
    found: set[int] = set()
    for move, left in moves(numbers):
        found.add(move.result)
        found |= reachable(left)
    return frozenset(found)


def solution(numbers: tuple[int, ...], target: int, random: np.random.Generator) -> list[Move] | None:
    """Operations that end with `target`, drawn from all first operations that lead there; None where none do."""
    options: list[tuple[Move, tuple[int, ...] | None]] = []
    for move, left in moves(numbers):
        if move.result == target:
            options.append((move, None))
        if target in reachable(left):
            options.append((move, left))
    if not options:
        return None
    first, others = options[int(random.integers(len(options)))]
    return [first, *((solution(others, target, random) or []) if others else [])]


@dataclass(frozen=True)
class Countdown(NumberTask):
    """The task.

    Attributes:
        numbers: how many there are.
        largest: of them; the least is 1.
        style: `steps`: short lines for a small model, such as `3*5=15;7 15`: an operation, its result, and what is
            left; the last result is the answer. `chat`: a question in words, and the answer as an expression between
            `<answer>` and `</answer>`.
        right: share of the traces to learn the format from that reach the target; the others are legal, and random.

    Raises:
        UserError: a value is out of range.
    """

    numbers: int = 3
    largest: int = 9
    style: Style = "steps"
    right: float = 1.0

    name = "countdown"
    longest = 40  # characters of a completion in steps

    def __post_init__(self) -> None:
        check_types(self)
        if not 2 <= self.numbers <= 6 or not 2 <= self.largest <= 99:
            raise UserError(f"numbers={self.numbers}, largest={self.largest}: expected 2 to 6, and 2 to 99.")
        if not 0 <= self.right <= 1:
            raise UserError(f"right={self.right}: expected a share.")

    def multisets(self, split: str) -> list[tuple[int, ...]]:
        """Of `train` or of `test`, sorted."""
        every = combinations_with_replacement(range(1, self.largest + 1), self.numbers)
        return [numbers for numbers in every if held_out(numbers) == (split == "test")]

    def problems(self, split: str, count: int, seed: int = 0) -> list[CountdownProblem]:
        """`count` of them, no two with the same multiset and target as long as there are others."""
        random = np.random.default_rng([seed, split == "test"])
        every = [
            (numbers, target)
            for numbers in self.multisets(split)
            for target in sorted(reachable(numbers) - set(numbers))
            if 1 <= target <= LARGEST_TARGET
        ]
        order = np.concatenate([random.permutation(len(every)) for _ in range(-(-count // len(every)))])[:count]
        return [CountdownProblem(tuple(map(int, random.permutation(every[i][0]))), every[i][1]) for i in order]

    def prompt(self, problem: CountdownProblem) -> Prompt:
        """See `NumberTask`."""
        if self.style == "steps":
            return f"{' '.join(map(str, problem.numbers))}>{problem.target}:"
        return [
            {
                "role": "user",
                "content": f"Using the numbers {', '.join(map(str, problem.numbers))}, each at most once, and the "
                f"operations + - * /, write an expression that equals {problem.target}. Think in short steps, then "
                "give the expression between <answer> and </answer>, for example <answer>(1+2)*3</answer>.",
            }
        ]

    def trace(self, problem: CountdownProblem, random: np.random.Generator) -> str:
        """See `NumberTask`."""
        numbers = tuple(sorted(problem.numbers))
        right = solution(numbers, problem.target, random) if random.random() < self.right else None
        return "\n".join(_lines(numbers, right or _wander(numbers, random)))

    def reached(self, problem: CountdownProblem, completion: str) -> int | None:
        """See `NumberTask`."""
        if self.style == "steps":
            return _reached_by_steps(problem.numbers, completion)
        value = evaluate(answer_of(completion))
        if Counter(value.numbers) - Counter(problem.numbers) or value.value.denominator != 1:
            return None
        return int(value.value)


def _wander(numbers: tuple[int, ...], random: np.random.Generator) -> list[Move]:
    """Legal operations at random until one number is left."""
    found = []
    while len(numbers) > 1:
        options = list(moves(numbers))
        move, numbers = options[int(random.integers(len(options)))]
        found.append(move)
    return found


def _lines(numbers: tuple[int, ...], path: Sequence[Move]) -> Iterator[str]:
    for move in path:
        numbers = after(numbers, move)
        yield f"{move};{' '.join(map(str, numbers))}" if len(numbers) > 1 else str(move)


def after(numbers: tuple[int, ...], move: Move) -> tuple[int, ...]:
    """The numbers that are left, sorted."""
    left = list(numbers)
    left.remove(move.left)
    left.remove(move.right)
    return tuple(sorted([*left, move.result]))


def _reached_by_steps(numbers: tuple[int, ...], completion: str) -> int | None:
    if completion.count("\n") >= len(numbers) or len(completion) > 40 * len(numbers):
        return None
    left, result = tuple(sorted(numbers)), None
    for line in completion.split("\n"):
        written, _, rest = line.partition(";")
        move = read_move(written)
        if move is None:
            if result is None:
                raise NotArithmetic("there is no operation")
            return None
        missing = Counter((move.left, move.right)) - Counter(left)
        if missing or not legal(move):
            return None
        left, result = after(left, move), move.result
        if rest != (" ".join(map(str, left)) if len(left) > 1 else ""):
            return None
    return result


def read_move(text: str) -> Move | None:
    """An operation as it is written; None where it is none."""
    for operation in "+-*/":
        before, found, behind = text.partition(operation)
        if found:
            right, equals, result = behind.partition("=")
            parts = (before, right, result)
            if equals and all(part.isascii() and part.isdigit() and len(part) <= 12 for part in parts):
                return Move(int(before), operation, int(right), int(result))
            return None
    return None


def legal(move: Move) -> bool:
    """Whether the result is right and within the rules."""
    if move.operation == "/":
        return move.right > 0 and move.left == move.result * move.right
    values = {"+": move.left + move.right, "-": move.left - move.right, "*": move.left * move.right}
    return values[move.operation] == move.result >= 0
