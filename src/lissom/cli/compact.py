"""`lissom compact`: a document in, a small cache file out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from lissom.cli.common import JSON, MODEL, bars, read_text, share


def register(app: typer.Typer) -> None:
    app.command()(compact)


def compact(
    model: str = typer.Argument("smollm2-135m", help=MODEL),
    document: Path = typer.Option(..., "--document", "-d", help="Text file to read."),
    output: Path = typer.Option(..., "--output", "-o", help="Cache file to write (safetensors)."),
    ratio: float = typer.Option("0.1", parser=share, metavar="SHARE", help="Of the cache to keep: 0.1 or 10%."),
    select: str = typer.Option("hak", help="Key selection: hak, omp, omp-fast, omp-progressive, random."),
    queries: str = typer.Option("repeat", help="Reference queries: context, repeat, self-study, repeat+self-study."),
    head_budgets: str = typer.Option("auto", help="auto, uniform, global, or measured (by `lissom budgets`)."),
    dtype: str = typer.Option("auto", help="float32, bfloat16, float16 or auto, the checkpoint's own."),
    seed: int = typer.Option(0, min=0, max=2**61, help="Seed of the query sample."),
    json_file: str = JSON,
) -> None:
    """Read a document once and keep a small KV cache of it, by attention matching."""
    from rich.console import Console

    import lissom
    from lissom.errors import UserError
    from lissom.files import require_writable, write_json
    from lissom.kv import AttentionMatching, file
    from lissom.kv import compact as make_compact
    from lissom.kv.document import document_ids
    from lissom.kv.influence import load_shares

    settings = {"ratio": ratio, "select": select, "queries": queries, "seed": seed}
    if head_budgets != "measured":
        settings["budgets"] = head_budgets
    method = AttentionMatching(**settings)  # type: ignore[arg-type]
    text = read_text(document)
    if output.is_dir():
        raise UserError(f"{output} is a folder: --output names the cache file.")
    require_writable(output)
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        network, tokenizer = lissom.load(model, dtype)
    if head_budgets == "measured":
        method = replace(method, budgets="measured", shares=load_shares(network))
    ids = document_ids(tokenizer, text)
    with bars(console) as bar:
        tasks = {stage: bar.add_task(stage, total=None) for stage in ("read", "queries", "fit")}
        cache = make_compact(
            network,
            ids,
            method,
            tokenizer=tokenizer,
            progress=lambda stage, done, total: bar.update(tasks[stage], completed=done, total=total),
        )
    file.save(cache, output, network, tokens=ids, settings=method.settings())
    entries = ids.shape[1] * len(cache.compact_layers()) * cache.heads
    if json_file:
        facts = {"tokens": ids.shape[1], "stored_entries": cache.stored_entries, "full_entries": entries,
                 "stored_bytes": cache.stored_bytes}  # fmt: skip
        write_json({"cache": str(output), "model": model, **facts, "settings": method.settings()}, json_file)
    if json_file != "-":
        typer.echo(
            f"{output}: {ids.shape[1]} tokens in {cache.stored_bytes / 1e6:.2f} MB "
            f"({cache.stored_entries / entries:.1%} of the entries kept). Ask with:\n"
            f'  lissom generate {model} --cache {output} "your question"'
        )
