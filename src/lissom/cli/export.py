"""`lissom export`: a model as a file for another runtime."""

from __future__ import annotations

from pathlib import Path

import typer

from lissom.cli.common import JSON, MODEL

_TYPE = (
    "Of weights that are not packed: auto (their own dtype), f16, bf16, q8_0, q4_0, q4_1; "
    "of ternary ones: tq2_0 (auto), tq1_0."
)

app = typer.Typer(help="Write a model for another runtime.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="export")


@app.callback()
def export() -> None:
    """Write a model for another runtime."""


@app.command()
def packed(
    model: str = typer.Argument(..., help="Folder that `lissom train --method` has left."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write."),
    json_file: str = JSON,
) -> None:
    """Write a model in training in the packed form of its method, for transformers with `import lissom`."""
    from rich.console import Console

    import lissom
    from lissom.export.packed import export_packed
    from lissom.files import require_new, write_json

    require_new(output)
    console = Console(stderr=True)
    with console.status(f"packing {model}"):
        export_packed(*lissom.load(model, "float32"), output)
    size = sum(file.stat().st_size for file in output.iterdir())
    if json_file:
        write_json({"folder": str(output), "model": model, "bytes": size}, json_file)
    if json_file != "-":
        typer.echo(f"{output}: {size / 1e6:.1f} MB.")


@app.command()
def gguf(
    model: str = typer.Argument(..., help=MODEL),
    output: Path = typer.Option(..., "--output", "-o", help="File to write (.gguf)."),
    kind: str = typer.Option("auto", "--type", help=_TYPE),
    json_file: str = JSON,
) -> None:
    """Write a GGUF file for llama.cpp. Packed weights, also those of a GGUF file, keep their own type without loss."""
    from rich.console import Console

    import lissom
    from lissom.errors import UserError
    from lissom.export.gguf import TYPES, export_gguf
    from lissom.files import require_writable, write_json

    if kind not in TYPES:
        raise UserError(f"--type {kind}: expected one of {', '.join(TYPES)}.")
    if output.is_dir():
        raise UserError(f"{output} is a folder: --output names the file.")
    require_writable(output)
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        network, tokenizer = lissom.load(model, "auto", weights="packed")
    with console.status(f"writing {output}"):
        counts = export_gguf(network, tokenizer, output, kind)
    size = output.stat().st_size
    if json_file:
        write_json({"file": str(output), "model": model, "bytes": size, "matrices": counts}, json_file)
    if json_file != "-":
        types = ", ".join(f"{count} {name}" for name, count in counts.items())
        typer.echo(f"{output}: {size / 1e6:.1f} MB, matrices: {types}.")
