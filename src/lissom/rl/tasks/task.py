"""What a task for learning from reward is, and what all have whose answer is a number."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from lissom.rl.tasks.expressions import NotArithmetic

Style = Literal["steps", "chat"]
Prompt = str | list[dict[str, str]]
HELD_OUT = 0.2  # of the multisets of numbers
_LOOKED_AT = 4096  # characters at the end of a completion


class NumberTask(ABC):
    """Problems, prompts and graders. A grader never runs what the policy wrote, and ends in bounded time.

    Attributes:
        name: of it.
        longest: characters of a completion in steps, at most.
    """

    name: ClassVar[str]
    longest: ClassVar[int]

    @abstractmethod
    def problems(self, split: str, count: int, seed: int = 0) -> Sequence[Any]:
        """Of `train` or of `test`, which share no multiset of numbers. Each has a `target`."""

    @abstractmethod
    def prompt(self, problem: Any) -> Prompt:
        """What the policy is given: text, or messages of a chat."""

    @abstractmethod
    def trace(self, problem: Any, random: np.random.Generator) -> str:
        """A completion to learn the format from, right or wrong."""

    @abstractmethod
    def reached(self, problem: Any, completion: str) -> int | None:
        """The number that a completion ends at; None where it breaks a rule.

        Raises:
            NotArithmetic: there is no answer at all.
        """

    def correct(self, problem: Any, completion: str) -> float:
        """The sparse reward: 1 where the problem is solved, otherwise 0."""
        try:
            return float(self.reached(problem, completion) == problem.target)
        except NotArithmetic:
            return 0.0

    def dense(self, problem: Any, completion: str) -> float:
        """From -1 to 1: -1 without an answer, -0.9 for one against the rules, otherwise the nearer the better."""
        try:
            value = self.reached(problem, completion)
        except NotArithmetic:
            return -1.0
        return -0.9 if value is None else closeness(value, problem.target)


def closeness(value: float, target: float) -> float:
    """1 where they are equal, falling to -1 where they are as far apart as the target is from 0."""
    return 1 - 2 * min(abs(value - target) / max(abs(target), 1), 1)


def held_out(numbers: Sequence[int]) -> bool:
    """Whether problems with these numbers, in any order, are measured and not trained on: by a digest, so that it is
    the same everywhere."""
    digest = hashlib.sha256(repr(tuple(sorted(map(int, numbers)))).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def answer_of(completion: str) -> str:
    """What stands between the last `<answer>` and the `</answer>` behind it.

    Raises:
        NotArithmetic: there is none.
    """
    text = completion[-_LOOKED_AT:]
    begin = text.rfind("<answer>")
    end = text.find("</answer>", begin)
    if begin < 0 or end < 0:
        raise NotArithmetic("there is no <answer>")
    return text[begin + len("<answer>") : end]
