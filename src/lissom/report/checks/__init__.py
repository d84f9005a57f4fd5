"""What `lissom check METHOD` runs: whatever is installed as an entry point of the group `lissom.checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.box import SIMPLE
from rich.table import Table

import lissom
from lissom.models.load import DEFAULT_MODEL
from lissom.models.registry import registered
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
        model: what is taken where no other is given; None: one that the check trains.
    """

    stages: Sequence[str]
    model: str | None

    def __call__(self, size: SizeName, model: str | None, journal: Path, progress: Progress) -> Outcome:
        """Measure; a run that was stopped goes on with what `journal` holds.

        Args:
            model: asset, model folder, .gguf file or Hub id; of a diffusion model the folder of its pipeline.
            progress: called with (stage, done, total).
        """
        ...


@dataclass(frozen=True)
class StudyCheck:
    """A check that is made of a study in `lissom.evals.checks` and of what shows its run.

    Attributes:
        stages, model: see `Check`.
        sizes: of the study, by name.
        run: called with what `load` gives, a size, a journal and a progress function.
        result: of what `run` returns, in the one shape of everything measured.
        tables: of the same, for the terminal.
        load: called with the name of a model.
    """

    stages: Sequence[str]
    sizes: Mapping[SizeName, Any]
    run: Callable[..., Any]
    result: Callable[[Any], Result]
    tables: Callable[[Any], Iterable[Table]]
    model: str | None = DEFAULT_MODEL
    load: Callable[[Any], Sequence[Any]] = lissom.load

    def __call__(self, size: SizeName, model: str | None, journal: Path, progress: Progress) -> Outcome:
        """See `Check`."""
        return self.measure(self.sizes[size], model, journal, progress)

    def measure(self, size: Any, model: str | None, journal: Path, progress: Progress) -> Outcome:
        """The same at any size of the study."""
        run = self.run(*self.load(model or self.model), size, journal, progress)
        return Outcome(self.result(run), list(self.tables(run)))


def study_check(
    study: Any, result: Callable[[Any], Result], tables: Callable[[Any], Iterable[Table]], **own: Any
) -> StudyCheck:
    """The check of a module of `lissom.evals.checks`.

    Args:
        own: further attributes of `StudyCheck`.
    """
    sizes: dict[SizeName, Any] = {"small": study.SMALL, "default": study.DEFAULT, "paper": study.PAPER}
    return StudyCheck(study.STAGES, sizes, study.run, result, tables, **own)


def model_or_none(model: str | None) -> tuple[str | None]:
    """What a study is given that trains a model of its own where it is given none: a folder, or nothing."""
    return (model,)


def grid(title: str, *headings: str, numbers: bool = False) -> Table:
    """An empty table; with `numbers` all columns but the first are to the right."""
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if numbers and number else "left")
    return table


def check_of(method: str) -> Check:
    """The check of `method`.

    Raises:
        UserError: there is none.
    """
    check: Check = registered(GROUP, method, "check of")
    return check
