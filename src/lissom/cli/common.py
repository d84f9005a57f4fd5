"""What several commands share: their arguments, progress bars, and reading a document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

MODEL = "Asset, model folder, .gguf file or Hub id."
PIPELINE = "Folder of a pipeline of diffusers, such as `lissom train-dit` writes, or Hub id."
JSON = typer.Option(None, "--json", metavar="FILE", help="Write the result as JSON ('-': standard output).")


def share(text: str | float) -> float:
    """A share from '0.1' or '10%'.

    Raises:
        typer.BadParameter: it is no number.
    """
    try:
        number = str(text).strip()
        return float(number.removesuffix("%")) / 100 if number.endswith("%") else float(number)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no share: expected a number such as 0.1 or 10%.") from error


def bars(console: Console) -> Progress:
    """Progress bars with counts and the time that is left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def read_text(path: Path) -> str:
    """A document from a text file.

    Raises:
        UserError: it is empty or no text.
    """
    from lissom.errors import UserError

    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file in UTF-8.") from error
    if not text.strip():
        raise UserError(f"{path} is empty: there is nothing to read.")
    return text
