"""`lissom check METHOD`: the method's claim, measured on this machine against its baselines."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(check)


def check(
    method: str = typer.Argument(..., help="attention-matching."),
    model: str = typer.Option("smollm2-135m", help="Asset, model folder, .gguf file or Hub id."),
    small: bool = typer.Option(False, "--small", help="Two short documents: at most 20 minutes on two cores."),
    paper: bool = typer.Option(False, "--paper", help="The size of the paper, for a GPU; unmeasured here."),
    journal: Path = typer.Option(
        Path("lissom-check/attention-matching.jsonl"),
        help="Where each measurement is kept; a killed run goes on there.",
    ),
    json_file: str = typer.Option(
        None, "--json", metavar="FILE", help="Write the result as JSON ('-': standard output)."
    ),
) -> None:
    """Reproduce a method's claim at the scale of this machine; a null result is shown as one."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import lissom.models
    from lissom.errors import UserError
    from lissom.evals.checks import attention_matching as study
    from lissom.files import require_writable
    from lissom.report.checks import attention_matching_result, attention_matching_tables

    if method != "attention-matching":
        raise UserError(f"There is no check for {method!r}. Known: attention-matching.")
    if small and paper:
        raise UserError("Give either --small or --paper.")
    if json_file and json_file != "-":
        require_writable(json_file)
    size = study.SMALL if small else study.PAPER if paper else study.DEFAULT
    errors, out = Console(stderr=True), Console()
    with errors.status(f"loading {model}"):
        network, tokenizer = lissom.models.load(model)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as bar:
        tasks = {stage: bar.add_task(stage, total=None, visible=False) for stage in study.STAGES}
        run = study.run(
            network,
            tokenizer,
            size,
            journal,
            lambda stage, done, total: bar.update(tasks[stage], completed=done, total=total, visible=True),
        )
    result = attention_matching_result(run)
    if json_file:
        result.write(json_file)
    if json_file != "-":
        for table in attention_matching_tables(run):
            out.print(table)
        for claim in result.claims:
            out.print(f"[bold]{claim.verdict}[/bold]: {claim.claim} ({claim.source})", highlight=False)
