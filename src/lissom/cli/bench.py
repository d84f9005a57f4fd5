"""`lissom bench`: this machine's tokens per second, beside those of what one would use instead."""

from __future__ import annotations

import typer

from lissom.cli.common import JSON, MODEL, bars


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    model: str = typer.Argument("smollm2-135m", help=MODEL),
    contexts: str = typer.Option("512", metavar="N,N", help="Tokens of the prompts that are read."),
    threads: str = typer.Option(None, metavar="N,N", help="Numbers of threads. [default: all]"),
    only: str = typer.Option(
        None,
        metavar="NAME,NAME",
        help="Runtimes, such as lissom,llama.cpp. [default: all; they lie in memory together]",
    ),
    rounds: int = typer.Option(5, min=1, help="Turns of decoding, all runtimes in each."),
    tokens: int = typer.Option(32, min=1, help="Tokens that are generated in each turn."),
    weights: str = typer.Option("auto", help="lissom's: auto (the model's own, or int4), native, bf16, int8, int4."),
    kv: str = typer.Option("bf16", help="lissom's cache: bf16, int8, fp32."),
    json_file: str = JSON,
) -> None:
    """Measure decode speed, time to the first token and peak memory of lissom and of other runtimes, interleaved.

    A runtime that another Python has is used where LISSOM_LLAMA_CPP_PYTHON, LISSOM_OPENVINO_PYTHON or
    LISSOM_ONNXRUNTIME_PYTHON names it. What is not installed is listed with the reason.
    """
    from rich.console import Console

    from lissom.errors import UserError
    from lissom.files import require_writable

    wanted = numbers("--contexts", contexts)
    counts = numbers("--threads", threads) if threads else []
    if json_file and json_file != "-":
        require_writable(json_file)
    console = Console(stderr=True)
    with bars(console) as bar:
        task = bar.add_task("starting", total=None)
        from lissom.decode import NativeDecode
        from lissom.evals.peers import Size, choose, compare
        from lissom.report.peers import result, tables, unmeasured

        NativeDecode(weights="native" if weights == "auto" else weights, kv=kv)  # type: ignore[arg-type]  # may raise
        comparison = compare(
            model,
            wanted,
            counts,
            choose([name.strip() for name in only.split(",")] if only else (), weights=weights, kv=kv),
            Size(rounds=rounds, tokens=tokens),
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if not comparison.figures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in comparison.failed.items())
        raise UserError(f"Nothing could be measured. {reasons}")
    if json_file:
        result(comparison).write(json_file)
    if json_file != "-":
        out = Console()
        for table in tables(comparison):
            out.print(table)
        for reason in unmeasured(comparison):
            out.print(f"Not measured: {reason}", highlight=False, markup=False)
        for note in comparison.notes:
            out.print(note, highlight=False, markup=False)


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers from '1,2'.

    Raises:
        UserError: it is something else.
    """
    from lissom.errors import UserError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise UserError(f"{option} {text}: expected whole numbers of at least 1 with commas between them, such as 1,2.")
    return list(dict.fromkeys(found))
