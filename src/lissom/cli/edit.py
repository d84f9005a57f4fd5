"""`lissom edit`: a picture from words and reference pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lissom.cli.common import JSON, PIPELINE
from lissom.cli.pictures import draw, keep, named, read_picture, recipe_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from lissom.diffusion.klein_kv import KleinKV

_CACHES = ("auto", "on", "off", "force", "approximate")


def register(app: typer.Typer) -> None:
    app.command()(edit)


def edit(
    pipeline: str = typer.Argument(..., help=PIPELINE),
    image: list[Path] = typer.Option([], "--image", help="Reference picture; give the option again for each."),
    prompt: str = typer.Option("", help="What to draw."),
    output: Path = typer.Option(..., "--output", "-o", help="Picture to write: .png, .jpg, .webp."),
    recipe: Path = typer.Option(None, help="Recipe in the place of --cache, --storage and --steps."),
    steps: int = typer.Option(None, help="Of the sampler. [default: the pipeline's]"),
    guidance: float = typer.Option(
        None, help="The higher, the more closely the prompt is followed. [default: the pipeline's]"
    ),
    size: int = typer.Option(None, help="Pixels of a side. [default: the pipeline's]"),
    count: int = typer.Option(1, help="Pictures; further ones are written as NAME-2.png and so on."),
    seed: int = typer.Option(0, help="Of the noise."),
    cache: str = typer.Option(
        "auto",
        help="References are read once: auto (where the model allows it), on, off, force (whatever it does); "
        "approximate: those of FLUX.1 and Qwen-Image are taken from the first step.",
    ),
    storage: str = typer.Option("model", help="Of what is read of references: model (its own type), int8, fp8."),
    references: Path = typer.Option(
        None,
        help="File of references that were read: used where it is there, else written, so that they are read once.",
    ),
    dtype: str = typer.Option("float32", help="Of the weights: float32, bfloat16, float16."),
    json_file: str = JSON,
) -> None:
    """Draw with reference pictures, whose keys and values are computed once and used in every step."""
    from lissom.devices.meters import threads
    from lissom.diffusion.klein_kv import KleinKV
    from lissom.diffusion.klein_kv.apply import references_of
    from lissom.diffusion.load import load_pipeline
    from lissom.errors import UserError

    if cache not in _CACHES:
        raise UserError(f"--cache {cache}: expected one of {', '.join(_CACHES)}.")
    if cache in ("on", "force", "approximate") and not image and not references:
        raise UserError(f"--cache {cache} is of references: give at least one --image.")
    if references and cache not in ("auto", "on"):
        raise UserError(f"--references keeps what a cache holds, which --cache {cache} does not go with.")
    targets = named(output, count)
    pictures = [read_picture(file) for file in image]
    method = KleinKV(
        mode="approximate" if cache == "approximate" else "exact",
        storage=storage,  # type: ignore[arg-type]
        force=cache == "force",
    )
    chosen, others = recipe_of(recipe, steps, cache != "auto" or storage != "model"), []
    if chosen is not None:
        methods = chosen.pipeline_methods()
        if any("guide" in own.inputs for own in methods):
            raise UserError(f"{recipe} has a method that needs a guide: use `lissom refine`.")
        dtype = dtype if chosen.dtype == "auto" else chosen.dtype
        own = next((own for own in methods if isinstance(own, KleinKV)), None)
        others = [other for other in methods if other is not own]
        method, cache = own or method, "on" if own else "off"
        if references and cache == "off":
            raise UserError(f"{recipe} has no klein-kv: leave out --references.")
    loaded = load_pipeline(pipeline, dtype)
    if cache == "auto" and references_of(loaded) == "joint":
        cache = "off"
    if storage != "model" and (cache == "off" or not pictures):
        raise UserError(f"--storage {storage} is of references that are read, and none are here: leave it out.")
    began = time.perf_counter()
    wanted, cores = (steps, None) if chosen is None else (chosen.steps, chosen.threads)
    with ExitStack() as stack:
        stack.enter_context(threads(cores))
        for other in others:
            stack.enter_context(other(loaded))
        shown, facts = stack.enter_context(_cached(method, loaded, pictures, cache, references))
        drawn = draw(
            loaded, wanted, seed,
            image=shown or None, prompt=prompt, guidance_scale=guidance,
            num_images_per_prompt=count, height=size, width=size,
        )  # fmt: skip
    facts["seconds"] = time.perf_counter() - began
    keep(drawn, targets, facts, json_file)
    if json_file != "-":
        typer.echo(_told(facts, bool(image)))


@contextmanager
def _cached(
    method: KleinKV, pipeline: DiffusionPipeline, pictures: list[Image.Image], cache: str, file: Path | None
) -> Iterator[tuple[list[Image.Image], dict[str, Any]]]:
    """What of `pictures` the pipeline is to be given, and facts of the cache, which are there when the block ends."""
    from lissom.diffusion.klein_kv import WarmReferences
    from lissom.errors import UserError

    facts: dict[str, Any] = {}
    if file is not None:
        if file.exists() and pictures:
            raise UserError(f"{file} holds references already: leave out --image, or delete the file.")
        if file.exists():
            warm = WarmReferences.load(file)
        elif pictures:
            warm = method.prefill(pipeline, pictures)
            warm.save(file)
        else:
            raise UserError(f"{file} is not there, and there is no --image to read.")
        facts["reference_bytes"] = warm.nbytes
        with warm(pipeline):
            yield [], facts
    elif not pictures or cache == "off":
        yield pictures, facts
    else:
        with method(pipeline) as report:
            yield pictures, facts
        facts["reference_passes"] = report.reference_passes
        facts |= {} if method.mode == "approximate" else {"reference_bytes": report.store.nbytes}
        facts |= {} if report.damage is None else {"damage": report.damage}


def _told(facts: dict[str, Any], shown: bool) -> str:
    words = f"{facts['seconds']:.2f} s"
    if "reference_bytes" in facts:
        words += f"; what was read of the references takes {facts['reference_bytes'] / 1e6:.1f} MB"
    elif "reference_passes" in facts:
        words += f"; passes with references: {facts['reference_passes']}"
    elif shown:
        words += "; references were in every step"
    if "damage" in facts:
        words += f"; the first output without references in it is off by {facts['damage']:.1%}"
    return words + "."
