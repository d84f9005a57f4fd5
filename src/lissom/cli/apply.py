"""`lissom apply`: a recipe applied to a model, as a folder that stands on its own."""

from __future__ import annotations

from pathlib import Path

import typer

from lissom.cli.common import JSON, MODEL


def register(app: typer.Typer) -> None:
    app.command()(apply)


def apply(
    recipe: Path = typer.Argument(..., help="Recipe file (YAML)."),
    model: str = typer.Argument(None, help=f"{MODEL} [default: the recipe's]"),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write."),
    json_file: str = JSON,
) -> None:
    """Write the model with the recipe applied: a folder of transformers with the recipe in it.

    `lissom generate FOLDER` uses both; plain transformers loads the weights alone.
    """
    from rich.console import Console

    from lissom.errors import UserError
    from lissom.files import atomic_path, require_writable, write_json
    from lissom.recipes import Recipe
    from lissom.recipes.recipe import FILE_NAME

    chosen = Recipe.load(recipe)
    if model:
        chosen = chosen.model_copy(update={"model": model})
    if output.exists() and not (output / FILE_NAME).exists() and (output.is_file() or any(output.iterdir())):
        raise UserError(f"{output} exists and was not written by `lissom apply`; give another folder.")
    require_writable(output)
    with Console(stderr=True).status(f"loading {chosen.model}"):
        network, tokenizer = chosen.load_model()
    with atomic_path(output) as temporary:
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        running = chosen.halves()[1]
        running.model_copy(update={"model": str(output), "dtype": "auto"}).save(temporary / FILE_NAME)
    if json_file:
        write_json({"folder": str(output), "recipe": chosen.label}, json_file)
    if json_file != "-":
        typer.echo(f'{output}: {chosen.label}. Use it:\n  lissom generate {output} "your question"')
