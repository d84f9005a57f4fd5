"""Sums, differences and products of two numbers of two digits, answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement

import numpy as np

from lissom.errors import UserError
from lissom.models.method import check_types
from lissom.rl.tasks.expressions import evaluate
from lissom.rl.tasks.task import NumberTask, Prompt, Style, answer_of, held_out

_OPERATIONS = "+-*"


@dataclass(frozen=True)
class ArithmeticProblem:
    """Two numbers and what is done with them."""

    left: int
    operation: str
    right: int

    @property
    def target(self) -> int:
        """What it comes to."""
        return {"+": self.left + self.right, "-": self.left - self.right, "*": self.left * self.right}[self.operation]


@dataclass(frozen=True)
class TwoDigitArithmetic(NumberTask):
    """The task. Problems are split by the multiset of the two numbers: `34+71` is never measured where `71*34` was
    trained on.

    Attributes:
        operations: that there are, of `+`, `-` and `*`.
        style: `steps`: `34+71=` and the number. `chat`: a question, and the number between `<answer>` and `</answer>`.
        right: share of the traces to learn the format from that are right; in the others digits are changed.

    Raises:
        UserError: a value is out of range.
    """

    operations: str = "+-"
    style: Style = "steps"
    right: float = 1.0

    name = "arithmetic"
    longest = 8

    def __post_init__(self) -> None:
        check_types(self)
        if not self.operations or set(self.operations) - set(_OPERATIONS):
            raise UserError(f"operations={self.operations!r}: expected some of {_OPERATIONS}.")
        if not 0 <= self.right <= 1:
            raise UserError(f"right={self.right}: expected a share.")

    def problems(self, split: str, count: int, seed: int = 0) -> list[ArithmeticProblem]:
        """See `NumberTask`; differences are of the larger and the smaller number, so that none is below 0."""
        random = np.random.default_rng([seed, split == "test"])
        pairs = _pairs(split == "test")
        found = []
        for index in random.integers(len(pairs), size=count):
            operation = self.operations[int(random.integers(len(self.operations)))]
            one, other = pairs[index]
            if operation == "-" or random.random() < 0.5:
                one, other = other, one
            found.append(ArithmeticProblem(one, operation, other))
        return found

    def prompt(self, problem: ArithmeticProblem) -> Prompt:
        """See `NumberTask`."""
        sum_ = f"{problem.left}{problem.operation}{problem.right}"
        if self.style == "steps":
            return f"{sum_}="
        question = f"What is {sum_}? Give the number between <answer> and </answer>, for example <answer>12</answer>."
        return [{"role": "user", "content": question}]

    def trace(self, problem: ArithmeticProblem, random: np.random.Generator) -> str:
        """See `NumberTask`."""
        digits = str(problem.target)
        if random.random() >= self.right:
            place = int(random.integers(len(digits)))
            digits = f"{digits[:place]}{random.integers(10)}{digits[place + 1 :]}"
        return digits

    def reached(self, problem: ArithmeticProblem, completion: str) -> int | None:
        """See `NumberTask`."""
        value = evaluate(completion if self.style == "steps" else answer_of(completion))
        return value.value.numerator if len(value.numbers) == 1 else None  # the number itself, and no sum


@cache
def _pairs(held: bool) -> list[tuple[int, int]]:
    return [pair for pair in combinations_with_replacement(range(10, 100), 2) if held_out(pair) == held]
