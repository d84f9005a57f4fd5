"""`lissom assets`: the models and texts that lissom can fetch by itself."""

from __future__ import annotations

import sys
from typing import Any

import typer

from lissom.cli.common import JSON
from lissom.files import write_json

app = typer.Typer(help="List, fetch, locate, verify and remove models and texts.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="assets")


def say(text: str) -> None:
    """Progress for a person, apart from results."""
    print(f"lissom: {text}", file=sys.stderr)


@app.command("list")
def list_assets(json_file: str = JSON) -> None:
    """Every asset, its source and licence, and whether it is in the cache."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from lissom.models import assets

    facts: list[dict[str, Any]] = []
    for asset in assets.ASSETS.values():
        folder = assets.cache_dir() / asset.name
        size = assets.stored_bytes(folder) if assets.is_whole(folder) else None
        facts.append(
            {"name": asset.name, "kind": asset.kind, "source": asset.source.label, "licence": asset.licence,
             "about": asset.about, "cached_bytes": size}
        )  # fmt: skip
    if json_file:
        write_json(facts, json_file)
    if json_file != "-":
        table = Table("name", "kind", "source", "licence", "in the cache", "what it is", box=SIMPLE)
        for row in facts:
            size = row["cached_bytes"]
            here = "no" if size is None else f"{size / 1e6:.0f} MB"
            table.add_row(row["name"], row["kind"], row["source"], row["licence"], here, row["about"])
        Console().print(table)


@app.command()
def fetch(names: list[str] = typer.Argument(..., help="Names of assets.")) -> None:
    """Fetch and convert assets that the cache does not have whole; a damaged one is made anew."""
    from lissom.models import assets

    for name in names:
        assets.find(name)
    for name in names:
        typer.echo(assets.path(name, say, thorough=True))


@app.command()
def path(name: str = typer.Argument(..., help="Name of the asset.")) -> None:
    """Print the asset's folder, fetching it where it is missing."""
    from lissom.models import assets

    typer.echo(assets.path(name, say))


@app.command()
def verify(
    names: list[str] = typer.Argument(None, help="Names of assets. [default: all that are in the cache]"),
    json_file: str = JSON,
) -> None:
    """Compare every file of cached assets with its sha256; exit code 2 where one is missing or damaged."""
    from lissom.errors import UserError
    from lissom.models import assets

    chosen = names or [name for name in assets.ASSETS if (assets.cache_dir() / name).exists()]
    whole = {name: assets.is_whole(assets.cache_dir() / assets.find(name).name, thorough=True) for name in chosen}
    if json_file:
        write_json(whole, json_file)
    if json_file != "-":
        for name, good in whole.items():
            typer.echo(f"{assets.cache_dir() / name}: {'whole' if good else 'missing or damaged'}")
    bad = [name for name, good in whole.items() if not good]
    if bad:
        raise UserError(f"{', '.join(bad)}: missing or damaged. `lissom assets fetch {' '.join(bad)}` repairs it.")


@app.command()
def remove(name: str = typer.Argument(..., help="Name of the asset.")) -> None:
    """Delete an asset from the cache."""
    from lissom.models import assets

    typer.echo(f"{name}: {'removed' if assets.remove(name) else 'was not in the cache'}")
