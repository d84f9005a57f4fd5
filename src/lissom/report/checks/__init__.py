"""What `lissom check METHOD` runs: whatever is installed as an entry point of the group `lissom.checks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rich.table import Table

from lissom.recipes.registry import registered
from lissom.report.rows import Result

GROUP = "lissom.checks"
SizeName = Literal["small", "default", "paper"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """What a check measured, how it is shown in the terminal, and what could not be measured."""

    result: Result
    tables: Sequence[Table]
    unmeasured: Sequence[str] = ()


class Check(Protocol):
    """A method's claim, reproduced at one of three sizes.

    Attributes:
        stages: what `progress` is called with, in order.
    """

    stages: Sequence[str]

    def __call__(self, size: SizeName, model: str, journal: Path, progress: Progress) -> Outcome:
        """Measure; a run that was stopped goes on with what `journal` holds.

        Args:
            model: asset, model folder, .gguf file or Hub id.
            progress: called with (stage, done, total).
        """
        ...


def check_of(method: str) -> Check:
    """The check of `method`.

    Raises:
        UserError: there is none.
    """
    check: Check = registered(GROUP, method, "check of")
    return check
