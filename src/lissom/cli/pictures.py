"""What `lissom edit` and `lissom refine` share: pictures in and out, and the call that draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lissom.cli.common import bars

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from lissom.recipes import Recipe


def recipe_of(file: Path | None, steps: int | None, told: bool) -> Recipe | None:
    """A recipe that is not given together with what it tells.

    Args:
        told: whether settings of its methods are given beside it.

    Raises:
        UserError: it is, or it is no recipe.
    """
    from lissom.errors import UserError
    from lissom.recipes import Recipe

    if file is None:
        return None
    if steps is not None or told:
        raise UserError(f"{file} tells what is done, and how many steps there are: leave out the options that do, too.")
    return Recipe.load(file)


def named(output: Path, count: int) -> list[Path]:
    """Files of `count` pictures, whose kind must be one that can be written.

    Raises:
        UserError: it is not, or there is none.
    """
    from PIL import Image

    from lissom.errors import UserError
    from lissom.files import require_writable

    if count < 1:
        raise UserError(f"--count {count}: expected at least 1.")
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{output}: expected a picture such as {output.with_suffix('.png').name}.")
    files = [output, *(output.with_stem(f"{output.stem}-{number}") for number in range(2, count + 1))]
    for file in files:
        require_writable(file)
    return files


def read_picture(file: Path) -> Image.Image:
    """A picture, whole.

    Raises:
        UserError: it is none.
    """
    from PIL import Image

    from lissom.errors import UserError

    try:
        with Image.open(file) as opened:
            opened.load()
            return opened.copy()
    except FileNotFoundError as error:
        raise UserError(f"There is no picture {file}.") from error
    except Exception as error:  # decoders raise what they like
        raise UserError(f"{file} cannot be read as a picture: {str(error).splitlines()[0]}") from error


def sides_of(picture: Image.Image, longer: int) -> tuple[int, int]:
    """Width and height of a picture that is enlarged until its longer side has so many pixels; the shorter one is
    rounded to what pipelines mostly draw, multiples of 16, or of 4 where the longer one is no such."""
    unit = 16 if longer % 16 == 0 else 4 if longer % 4 == 0 else 1
    scale = longer / max(picture.size)
    width, height = (longer if side == max(picture.size) else max(unit, round(side * scale / unit) * unit)
                     for side in picture.size)  # fmt: skip
    return width, height


def draw(pipeline: DiffusionPipeline, steps: int | None, seed: int, **options: Any) -> list[Image.Image]:
    """Pictures, with a bar of ours, from a call with those of `options` that are not None."""
    import torch
    from rich.console import Console

    from lissom.diffusion.calls import arguments, own_steps, takes
    from lissom.diffusion.pictures import quiet
    from lissom.errors import UserError

    steps = own_steps(pipeline) if steps is None else steps
    for name in ("height", "width"):
        if options.get(name) is not None and options[name] < 1:
            raise UserError(f"A {name} of {options[name]} pixels: expected at least 1.")
    if not (options.get("guidance_scale") or 1.0) < float("inf"):
        raise UserError(f"--guidance {options['guidance_scale']}: expected a number.")
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: expected a number from 0 to below 2^63.")
    if steps < 1:
        raise UserError(f"--steps {steps}: expected at least 1.")
    given = arguments(pipeline, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), **options)
    with bars(Console(stderr=True)) as progress, quiet(pipeline):
        task = progress.add_task("steps", total=steps)

        def step(pipeline: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            progress.update(task, completed=number + 1)
            return {}

        if takes(pipeline, "callback_on_step_end"):
            given["callback_on_step_end"] = step
        pictures: list[Image.Image] = pipeline(**given).images
    return pictures


def keep(pictures: list[Image.Image], files: list[Path], facts: dict[str, Any], json_file: str | None) -> None:
    """Write pictures, each whole or not at all, and what is known of them."""
    from lissom.diffusion.pictures import write_picture
    from lissom.files import write_json

    for picture, file in zip(pictures, files, strict=True):
        write_picture(picture, file)
    if json_file:
        write_json({"files": [str(file) for file in files], **facts}, json_file)
    if json_file != "-":
        for file in files:
            typer.echo(str(file))
