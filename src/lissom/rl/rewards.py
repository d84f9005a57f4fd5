"""Reward functions as TRL calls them: those of the tasks, and anybody's, watched."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal

from lissom.errors import UserError
from lissom.rl.tasks.task import NumberTask

RewardFunction = Callable[..., list[float | None]]
Completion = str | list[dict[str, Any]]
RANGES = {"dense": (-1.0, 1.0), "correct": (0.0, 1.0)}  # of the tasks' rewards


def text_of(completion: Completion) -> str:
    """What the policy wrote: the completion, or the content of the last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    return content if isinstance(content, str) else ""


class TaskReward:
    """The reward of a task's problems, which rows of a data set name by `index`.

    Args:
        kind: `dense`, from -1 to 1, or `correct`, 1 or 0.
    """

    def __init__(self, task: NumberTask, problems: Sequence[Any], kind: Literal["dense", "correct"] = "dense") -> None:
        self.grade: Callable[[Any, str], float] = getattr(task, kind)
        self.problems = problems
        self.__name__ = kind

    def __call__(self, completions: Sequence[Completion], index: Sequence[int], **_: Any) -> list[float | None]:
        """A number for each completion."""
        return [
            self.grade(self.problems[place], text_of(completion))
            for place, completion in zip(index, completions, strict=True)
        ]


class Watched:
    """A reward function whose mistakes end the run with a sentence, rather than in a gradient.

    Args:
        function: called as TRL does: by name with `prompts`, `completions`, `completion_ids`, the columns of the data
            and `trainer_state`. It returns a number for each completion, or None where it has no opinion.
        low, high: between which rewards must be; None: anything finite.
    """

    def __init__(self, function: RewardFunction, low: float | None = None, high: float | None = None) -> None:
        if inspect.iscoroutinefunction(function):
            raise UserError(f"The reward function {_name(function)} is asynchronous: give one that is not.")
        self.function, self.low, self.high = function, low, high
        self.__name__ = _name(function)

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        """See `function`.

        Raises:
            UserError: it raises something, returns no list of that length, or a number that is not finite or not in the
                range.
        """
        try:
            given = self.function(completions=completions, **columns)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"The reward function {self.__name__} raised {type(error).__name__}: {error}.") from error
        try:
            rewards = [None if reward is None else float(reward) for reward in given]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The reward function {self.__name__} returned {type(given).__name__}: expected a list with a number, "
                "or None, for each completion."
            ) from error
        if len(rewards) != len(completions):
            raise UserError(
                f"The reward function {self.__name__} returned {len(rewards)} rewards for {len(completions)} "
                "completions."
            )
        for reward in rewards:
            if reward is not None and not math.isfinite(reward):
                raise UserError(f"The reward function {self.__name__} returned {reward}: expected finite numbers.")
            if reward is not None and self.low is not None and self.high is not None:
                slack = 1e-6 * max(1.0, abs(self.low), abs(self.high))
                if not self.low - slack <= reward <= self.high + slack:
                    raise UserError(
                        f"The reward function {self.__name__} returned {reward:g}: expected {self.low:g} to "
                        f"{self.high:g}, the range that was stated."
                    )
        return rewards


def load_reward(name: str) -> RewardFunction:
    """The function called `package.module:function`.

    Raises:
        UserError: there is none.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise UserError(f"{name!r} names no reward function: expected package.module:function.")
    try:
        found = getattr(import_module(module), function)
    except ImportError as error:
        raise UserError(f"The module {module} of the reward function cannot be imported: {error}.") from error
    except AttributeError as error:
        raise UserError(f"The module {module} has no function {function}.") from error
    if not callable(found):
        raise UserError(f"{name} is no function.")
    return found  # type: ignore[no-any-return]


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
