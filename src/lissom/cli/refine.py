"""`lissom refine`: a fine picture from a coarse one."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import typer

from lissom.cli.common import JSON, PIPELINE
from lissom.cli.pictures import draw, keep, named, read_picture, recipe_of, sides_of


def register(app: typer.Typer) -> None:
    app.command()(refine)


def refine(
    pipeline: str = typer.Argument(..., help=PIPELINE),
    guide: Path = typer.Option(..., help="Coarse picture: small, blurred, painted, or with parts that are missing."),
    output: Path = typer.Option(..., "--output", "-o", help="Picture to write: .png, .jpg, .webp."),
    prompt: str = typer.Option("", help="What it shows."),
    recipe: Path = typer.Option(None, help="Recipe in the place of --alpha, --level, --outside and --steps."),
    alpha: float = typer.Option(5.0, help="From 0, which gives the guide itself; the higher, the freer."),
    level: str = typer.Option("vp", help="Noise level that alpha is a power of: vp, or flow, where it is far freer."),
    mask: Path = typer.Option(None, help="Picture of the guide's size: white where the guide holds. [default: all]"),
    outside: float = typer.Option(float("inf"), help="Alpha where the mask is black; inf leaves that free."),
    image: list[Path] = typer.Option([], "--image", help="Reference picture; give the option again for each."),
    size: int = typer.Option(
        None, help="Pixels of the longer side, to which the guide is enlarged. [default: the guide's size]"
    ),
    steps: int = typer.Option(None, help="Of the sampler. [default: the pipeline's]"),
    guidance: float = typer.Option(
        None, help="The higher, the more closely the prompt is followed. [default: the pipeline's]"
    ),
    count: int = typer.Option(1, help="Pictures; further ones are written as NAME-2.png and so on."),
    seed: int = typer.Option(0, help="Of the noise."),
    dtype: str = typer.Option("float32", help="Of the weights: float32, bfloat16, float16."),
    json_file: str = JSON,
) -> None:
    """Draw near a coarse picture, with a model that was not trained for it, by the weighted h-transform."""
    from PIL import Image

    from lissom.diffusion.h_transform import HTransform
    from lissom.diffusion.klein_kv import KleinKV
    from lissom.diffusion.klein_kv.apply import references_of
    from lissom.diffusion.load import load_pipeline
    from lissom.errors import UserError

    targets = named(output, count)
    method = HTransform(alpha, level, outside)  # type: ignore[arg-type]
    chosen = recipe_of(recipe, steps, method != HTransform())
    dtype = dtype if chosen is None or chosen.dtype == "auto" else chosen.dtype
    guided = chosen is not None and any("guide" in own.inputs for own in chosen.pipeline_methods())
    coarse, covered = read_picture(guide), None if mask is None else read_picture(mask)
    references = [read_picture(file) for file in image]
    if size is not None and size < 1:
        raise UserError(f"--size {size}: expected at least 1.")
    if size is not None:
        sides = sides_of(coarse, size)
        coarse = coarse.resize(sides, Image.Resampling.BICUBIC)
        covered = None if covered is None else covered.resize(sides, Image.Resampling.NEAREST)
    loaded = load_pipeline(pipeline, dtype)
    began = time.perf_counter()
    with ExitStack() as stack:
        if chosen is not None:
            stack.enter_context(chosen.drawing(loaded, guide=coarse, mask=covered))
        elif references and references_of(loaded) != "joint":
            stack.enter_context(KleinKV()(loaded))
        if not guided:
            stack.enter_context(method(loaded, coarse, covered))
        drawn = draw(
            loaded, steps if chosen is None else chosen.steps, seed,
            image=references or None, prompt=prompt, guidance_scale=guidance,
            num_images_per_prompt=count, height=coarse.size[1], width=coarse.size[0],
        )  # fmt: skip
    seconds = time.perf_counter() - began
    keep(drawn, targets, {"seconds": seconds}, json_file)
    if json_file != "-":
        typer.echo(f"{seconds:.2f} s.")
