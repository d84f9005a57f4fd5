"""`lissom budgets`: how the entries of a compacted cache are best shared out over a model's heads, measured once."""

from __future__ import annotations

import typer

from lissom.cli.common import JSON, MODEL, bars


def register(app: typer.Typer) -> None:
    app.command()(budgets)


def budgets(
    model: str = typer.Argument("smollm2-135m", help=MODEL),
    documents: int = typer.Option(1, min=1, help="Documents that the heads are measured on."),
    tokens: int = typer.Option(700, min=64, help="Tokens of each."),
    json_file: str = JSON,
) -> None:
    """Measure each KV head's influence and keep the head budgets in the cache, for `--head-budgets measured`.

    A stopped run goes on where it was.
    """
    from rich.console import Console

    import lissom
    from lissom.evals.head_budgets import measure_head_budgets
    from lissom.files import write_json
    from lissom.kv.influence import path_of

    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        network, tokenizer = lissom.load(model)
    with bars(console) as bar:
        task = bar.add_task("heads", total=None)
        shares = measure_head_budgets(
            network,
            tokenizer,
            documents,
            tokens,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    heads = shares.size
    if json_file:
        write_json({"model": model, "file": str(path_of(network)), "shares": shares.tolist()}, json_file)
    if json_file != "-":
        typer.echo(
            f"{path_of(network)}: {heads} heads, {shares.min() * heads:.2f} to {shares.max() * heads:.2f} times the "
            "mean. Use them with `lissom compact --head-budgets measured`."
        )
