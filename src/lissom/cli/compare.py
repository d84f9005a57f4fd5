"""`lissom compare`: recipes of one model, measured side by side."""

from __future__ import annotations

from pathlib import Path

import typer

from lissom.cli.common import JSON, MODEL, bars


def register(app: typer.Typer) -> None:
    app.command()(compare)


def compare(
    model: str = typer.Argument(..., help=MODEL),
    recipes: list[Path] = typer.Argument(..., help="Recipe files."),
    quick: bool = typer.Option(False, "--quick", help="One document and fewer questions."),
    journal: Path = typer.Option(Path("lissom-compare/measurements.jsonl"), help="Where each measurement is kept."),
    json_file: str = JSON,
) -> None:
    """Measure recipes against each other and against the untouched model, interleaved."""
    from rich.console import Console

    from lissom.evals.journal import Journal
    from lissom.recipes import Recipe

    chosen = [Recipe.load(path).model_copy(update={"model": model}) for path in recipes]
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        from lissom.evolve.measure import QUICK, Bench, Workload
        from lissom.evolve.optimize import compare as measure
        from lissom.report.results import result, table

        bench = Bench(model, QUICK if quick else Workload(), Journal(journal))
    with bars(console) as bar:
        task = bar.add_task("measuring", total=None)
        outcome = measure(
            bench,
            chosen,
            lambda label, done, planned: bar.update(task, description=label, completed=done, total=planned),
        )
    if json_file:
        result(outcome).write(json_file)
    if json_file != "-":
        Console().print(table(outcome, everything=True))
