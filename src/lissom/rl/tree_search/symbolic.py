"""Countdown without a language model: states are the numbers that are left, steps are all legal operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from lissom.rl.tasks.countdown import CountdownProblem, moves
from lissom.rl.tasks.task import closeness
from lissom.rl.tree_search.tree import Step


class Left(NamedTuple):
    """Numbers that are left, sorted, the target, and the last result."""

    numbers: tuple[int, ...]
    target: int
    last: int | None = None


def root_of(problem: CountdownProblem) -> Left:
    """Where a problem begins."""
    return Left(tuple(sorted(problem.numbers)), problem.target)


class SymbolicCountdown:
    """The puzzle itself, with values from random play-outs: what a search does when nothing is learned.

    Args:
        reward: `correct`: 1 where the last result is the target, otherwise -1; `dense`: by how near it is.
        playouts: whose mean is a state's value.
    """

    def __init__(self, reward: Literal["correct", "dense"] = "dense", playouts: int = 1) -> None:
        self.reward, self.playouts = reward, playouts

    def score(self, state: Left) -> float:
        """Of a path that ends here."""
        assert state.last is not None
        if self.reward == "correct":
            return 1.0 if state.last == state.target else -1.0
        return closeness(state.last, state.target)

    def expand(self, states: Sequence[Left], counts: Sequence[int], seed: int) -> list[list[Step[Left]]]:
        """All legal operations, whatever is asked for."""
        found = []
        for state in states:
            steps = []
            for move, left in moves(state.numbers):
                after = Left(left, state.target, move.result)
                ends = move.result == state.target or len(left) == 1
                steps.append(Step(str(move), after, 0.0, (), self.score(after) if ends else None))
            found.append(steps)
        return found

    def evaluate(self, states: Sequence[Left], seed: int) -> list[float]:
        """The mean of random games."""
        random = np.random.default_rng(seed)
        return [float(np.mean([self._play(state, random) for _ in range(self.playouts)])) for state in states]

    def _play(self, state: Left, random: np.random.Generator) -> float:
        while state.last != state.target and len(state.numbers) > 1:
            options = list(moves(state.numbers))
            move, left = options[int(random.integers(len(options)))]
            state = Left(left, state.target, move.result)
        return self.score(state) if state.last is not None else -1.0
