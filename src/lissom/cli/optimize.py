"""`lissom optimize`: the main job."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lissom.cli.common import JSON, MODEL, bars, share

if TYPE_CHECKING:
    from lissom.recipes import Recipe
    from lissom.report.rows import Result

_RECIPE = "recipe.yaml"


def register(app: typer.Typer) -> None:
    app.command()(optimize)


def floor_of(text: str) -> float:
    """A share from a percentage: '2%' or '2'."""
    from lissom.errors import UserError

    try:
        value = share(text.strip().removesuffix("%") + "%")
    except typer.BadParameter:
        value = -1.0
    if not 0 <= value < 1:
        raise UserError(f"--max-quality-loss {text}: expected a percentage below 100, such as 5%.")
    return value


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """No other process searches into the folder `output`, which is made."""
    from filelock import FileLock, Timeout

    from lissom.errors import UserError

    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"Another lissom optimize is writing to {output}; give this one another --output.") from error
    except OSError as error:
        raise UserError(f"Cannot write to {output}: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


def optimize(
    context: typer.Context,
    model: str = typer.Argument("smollm2-135m", help=MODEL),
    device: str = typer.Option("this", help="'this', or the file that `lissom doctor --json FILE` wrote elsewhere."),
    max_quality_loss: str = typer.Option("5%", metavar="PCT", help="Loss that the recommended recipe may have."),
    budget: float = typer.Option(
        None, metavar="MINUTES", min=0.1, help="Begin nothing new after this. [default: 8; 2.5 with --quick]"
    ),
    prefer: str = typer.Option("balanced", help="speed, memory, or balanced (the geometric mean of both gains)."),
    tokens: int = typer.Option(
        None, "--tokens", min=64, help="Of the documents that are read. [default: 1024; 640 with --quick]"
    ),
    quick: bool = typer.Option(False, "--quick", help="Fewer candidates and questions: under three minutes."),
    peers: bool = typer.Option(
        True, "--peers/--no-peers", help="Measure llama.cpp, torch.compile, OpenVINO, ONNX Runtime beside it."
    ),
    refine: bool = typer.Option(
        False, "--refine", help="Of a diffusion model: how few steps `lissom refine` needs, not `lissom edit`."
    ),
    output: Path = typer.Option(Path("lissom-report"), "--output", "-o", help="Folder of the report."),
    json_file: str = JSON,
) -> None:
    """Find the recipe that makes MODEL small and fast on this machine within a quality floor, by measuring.

    Of a diffusion model, which is the folder of its pipeline: fewer steps, and references that are read once; the
    quality loss is 1 - SSIM to what the untouched pipeline draws from the same noise. With --refine it is searched in
    how few steps coarse pictures are refined.

    First how it runs (native passes, the file's own blocks, dtype, threads), then low-bit weights, then what acts on
    the KV cache. The result is compared with the other runtimes that are installed (`lissom bench --help` says how they
    are found).

    A second run goes on with what was measured; Ctrl-C keeps it and still writes the report.
    """
    from rich.console import Console

    from lissom.errors import UserError
    from lissom.evals.journal import Journal

    floor = floor_of(max_quality_loss)
    if (Path(model) / "model_index.json").is_file():
        for given, option in (
            (device != "this", "--device"), (prefer != "balanced", "--prefer"), (tokens, "--tokens"),
            (not peers, "--no-peers"),
        ):  # fmt: skip
            if given:
                raise UserError(f"{option} is of language models; a diffusion model is measured on this machine.")
        context.with_resource(_alone(output))
        _pipeline(model, floor, budget or (2.5 if quick else 8.0), refine, quick, output, json_file)
        return
    if refine:
        raise UserError(f"--refine is of diffusion models, and {model} is no folder of a pipeline.")
    if prefer not in ("balanced", "speed", "memory"):
        raise UserError(f"--prefer {prefer}: expected speed, memory or balanced.")
    context.with_resource(_alone(output))
    journal = Journal(output / "measurements.jsonl")
    console = Console(stderr=True)
    known = len(journal.records)
    with console.status(f"loading {model}"):
        from lissom.devices.profiles import Profile
        from lissom.evolve.measure import QUICK, Bench, Workload
        from lissom.evolve.optimize import optimize as search
        from lissom.evolve.peers import beside_peers

        profile = Profile.load(device)
        workload = QUICK if quick else Workload()
        bench = Bench(model, replace(workload, tokens=tokens) if tokens else workload, journal)
    if known:
        console.print(f"{known} measurements are in {output} already; what they cover is not measured again.")
    with bars(console) as bar:
        task = bar.add_task("untouched model", total=None)

        said = ""

        def show(label: str, done: int, planned: int) -> None:
            nonlocal said
            bar.update(task, description=label, completed=done, total=planned)
            line = f"{min(done + 1, planned)} of about {planned}: {label}"
            if not console.is_terminal and line != said:  # no bar there: a line for each measurement
                console.print(line, highlight=False, soft_wrap=True)
            said = line

        outcome = search(
            bench,
            floor,
            budget or (2.5 if quick else 8.0),
            prefer=prefer,  # type: ignore[arg-type]
            quick=quick,
            profile=profile,
            peers=partial(beside_peers, bench, quick=quick, progress=show) if peers else None,
            progress=show,
        )
    from lissom.evolve.optimize import answer_seconds
    from lissom.report import peers as beside
    from lissom.report.page import page
    from lissom.report.results import result, table

    command = f'lissom generate {model} --recipe {output / _RECIPE} --document FILE "your question"'
    found = result(outcome)
    ending = _keep(output, outcome.best.recipe, found, page(outcome, command), command)
    if json_file:
        found.write(json_file)
    if json_file != "-":
        out = Console()
        out.print(table(outcome))
        base, best = outcome.base, outcome.best
        if best is outcome.base:
            out.print(f"Nothing measured was better than the untouched model within a loss of {floor:.1%}.")
        else:
            whole = answer_seconds(base, profile) / answer_seconds(best, profile)
            speed, small = base.decode / best.decode, base.memory / best.memory
            out.print(
                f"Best within a loss of {floor:.1%}: [bold]{best.label}[/bold] "
                f"(whole answer {whole:.2f}x, decode {speed:.2f}x, memory of weights and cache ÷ {small:.1f})",
                highlight=False,
            )
        for label, reason in outcome.failed.items():
            out.print(f"Not measurable here: {label}: {reason}", highlight=False, markup=False)
        if outcome.untried:
            out.print(f"Not tried yet: {', '.join(outcome.untried)}.", highlight=False, markup=False)
        if outcome.peers:
            for view in beside.tables(outcome.peers):
                out.print(view)
            for line in (*outcome.peers.notes, *(f"Not compared: {r}" for r in beside.unmeasured(outcome.peers))):
                out.print(line, highlight=False, markup=False, soft_wrap=True)
        elif peers and not profile.measured:
            out.print(f"Other runtimes are not compared: they can only be measured on {profile.name} itself.")
        out.print(ending, highlight=False, markup=False, soft_wrap=True)
    if not outcome.finished:
        console.print("Stopped early; the report holds what was measured, and the same command goes on.")
        if outcome.interrupted:
            raise typer.Exit(2)


def _keep(output: Path, recipe: Recipe, found: Result, html: str, command: str) -> str:
    """Write what was found, and say where it is and how it is used."""
    from lissom.files import atomic_path

    page, results = output / "index.html", output / "results.json"
    recipe.save(output / _RECIPE)
    found.write(str(results))
    with atomic_path(page) as temporary:
        temporary.write_text(html)
    return f"Report: {page}   Results: {results}   Recipe: {output / _RECIPE}\nUse it:\n  {command}"


def _pipeline(
    model: str, floor: float, minutes: float, refine: bool, quick: bool, output: Path, json_file: str | None
) -> None:
    """The same for a pipeline of diffusers."""
    from rich.console import Console

    from lissom.evals.journal import Journal

    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        from lissom.diffusion.load import load_pipeline
        from lissom.evolve.pipelines import optimize_pipeline
        from lissom.report.pipelines import page, result, table

        loaded = load_pipeline(model)
    with bars(console) as bar:
        task = bar.add_task("untouched pipeline", total=None)
        outcome = optimize_pipeline(
            model, loaded, floor, Journal(output / "measurements.jsonl"), refine, quick, minutes,
            lambda label, done, total: bar.update(task, description=label, completed=done, total=total),
        )  # fmt: skip
    word, given = ("refine", "--guide") if refine else ("edit", "--image")
    command = f"lissom {word} {model} --recipe {output / _RECIPE} {given} FILE -o out.png"
    found = result(outcome)
    ending = _keep(output, outcome.best.recipe, found, page(outcome, model, command), command)
    if json_file:
        found.write(json_file)
    if json_file != "-":
        out = Console()
        out.print(table(outcome))
        out.print(f"Best within a loss of {floor:.1%}: [bold]{outcome.best.recipe.label}[/bold]", highlight=False)
        if outcome.untried:
            out.print(f"Not tried yet: {', '.join(outcome.untried)}.", highlight=False, markup=False)
        out.print(ending, highlight=False, markup=False, soft_wrap=True)
    if outcome.interrupted:
        console.print("Stopped early; the report holds what was measured, and the same command goes on.")
        raise typer.Exit(2)
