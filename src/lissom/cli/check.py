"""`lissom check METHOD`: the method's claim, measured on this machine against its baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lissom.cli.common import JSON, MODEL, bars

if TYPE_CHECKING:
    from lissom.report.checks import Outcome, Progress, SizeName


def register(app: typer.Typer) -> None:
    app.command()(check)


def check(
    method: str = typer.Argument(
        ..., help=f"Key of the method: {', '.join(sorted(entry_points(group='lissom.checks').names))}."
    ),
    model: str = typer.Option(
        None,
        help=f"{MODEL} Of a diffusion model: the folder of its pipeline. [default: smollm2-135m, or one trained here]",
    ),
    small: bool = typer.Option(False, "--small", help="At most 20 minutes on two cores. [default: up to two hours]"),
    paper: bool = typer.Option(False, "--paper", help="The size of the paper, for a GPU; unmeasured here."),
    journal: Path = typer.Option(
        None,
        help="Where each measurement is kept; a killed run goes on there. [default: lissom-check/METHOD.jsonl]",
    ),
    json_file: str = JSON,
) -> None:
    """Reproduce a method's claim at the scale of this machine; a null result is shown as one."""
    from lissom.errors import UserError
    from lissom.files import require_writable
    from lissom.report.checks import check_of

    if small and paper:
        raise UserError("Give either --small or --paper.")
    if json_file and json_file != "-":
        require_writable(json_file)
    chosen = check_of(method)
    size: SizeName = "small" if small else "paper" if paper else "default"
    show(
        measured(chosen.stages, partial(chosen, size), model or chosen.model, journal or journal_of(method)), json_file
    )


def journal_of(method: str) -> Path:
    """Where measurements are kept where nothing else is said."""
    return Path("lissom-check") / f"{method}.jsonl"


def measured(
    stages: Sequence[str], measure: Callable[[Any, Path, Progress], Outcome], model: str | None, journal: Path
) -> Outcome:
    """What `measure` returns, with a bar for each of its stages, or where there is no terminal with lines."""
    from rich.console import Console

    from lissom.evals.journal import Journal

    console, known = Console(stderr=True), len(Journal(journal).records)
    held = f" {known} are there and are not made again on the same machine." if known else ""
    console.print(
        f"Each measurement is kept in {journal} as it is made: the same command goes on there.{held}", soft_wrap=True
    )
    if not console.is_terminal:

        def say(stage: str, done: int, total: int) -> None:
            console.print(f"{stage}: {done} of {total}", soft_wrap=True)

        return measure(model, journal, say)
    with bars(console) as progress:
        loading = progress.add_task(f"loading {model or 'pictures'}", total=None)
        tasks = {stage: progress.add_task(stage, total=None, visible=False) for stage in stages}

        def report(stage: str, done: int, total: int) -> None:
            progress.update(loading, visible=False)
            progress.update(tasks[stage], completed=done, total=total, visible=True)

        return measure(model, journal, report)


def show(outcome: Outcome, json_file: str | None) -> None:
    """Tables and verdicts in the terminal, and the result as JSON where it is asked for."""
    from rich.console import Console

    if json_file:
        outcome.result.write(json_file)
    if json_file != "-":
        out = Console()
        for table in outcome.tables:
            out.print(table)
        for claim in outcome.result.claims:
            out.print(f"[bold]{claim.verdict}[/bold]: {claim.claim} ({claim.source})", highlight=False)
        for reason in outcome.unmeasured:
            out.print(f"Not measured: {reason}", highlight=False, markup=False)
