"""The main job for a diffusion model: fewer steps, and what its methods save, each measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from lissom.diffusion.calls import arguments, own_size, own_steps, takes
from lissom.diffusion.demo import BY_EXAMPLE, BY_WORD, draw, load_emoji
from lissom.diffusion.denoiser import denoiser, fingerprint
from lissom.diffusion.pictures import quiet, to_picture, to_pixels
from lissom.errors import UserError
from lissom.evals.guides import GUIDES
from lissom.evals.journal import Journal, scope_of
from lissom.evals.stats import Interval, paired_bootstrap
from lissom.models.registry import pipeline_methods
from lissom.recipes import Recipe

_FEWER = (0.6, 0.4, 0.3, 0.2)  # shares of the pipeline's own number of steps
_SIDE = 256  # pixels of the requests of pipelines that do not say


@dataclass(frozen=True)
class Request:
    """A prompt, and reference pictures or a coarse one.

    Attributes:
        guide: what is refined; None: nothing, it is an edit.
    """

    prompt: str
    references: tuple[Image.Image, ...] = ()
    guide: Image.Image | None = None


@dataclass(frozen=True, eq=False)
class Measured:
    """One recipe.

    Attributes:
        losses: of each request, 1 - SSIM to what the untouched pipeline draws from the same noise.
        seconds: of each request.
    """

    recipe: Recipe
    losses: np.ndarray
    seconds: np.ndarray

    @cached_property
    def loss(self) -> Interval:
        """Mean over the requests."""
        return paired_bootstrap(self.losses)

    @property
    def time(self) -> float:
        """Median seconds of a picture."""
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Outcome:
    """What was measured, the untouched pipeline first.

    Attributes:
        max_loss: the quality floor.
        untried: labels of recipes that there was no time for.
        refine: whether coarse pictures were refined, not references edited.
        interrupted: whether a key press ended it.
    """

    measured: list[Measured]
    max_loss: float
    untried: list[str]
    refine: bool = False
    interrupted: bool = False

    @property
    def base(self) -> Measured:
        """The untouched pipeline."""
        return self.measured[0]

    @property
    def best(self) -> Measured:
        """The fastest one within the floor."""
        allowed = [own for own in self.measured if own.loss.estimate <= self.max_loss]
        return min(allowed, key=lambda own: own.time)

    @cached_property
    def front(self) -> list[Measured]:
        """What nothing else beats in loss and time together."""
        points = [(own.loss.estimate, own.time) for own in self.measured]
        return [
            own
            for own, point in zip(self.measured, points, strict=True)
            if not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in points)
        ]


def recipes(name: str, pipeline: DiffusionPipeline, refine: bool, quick: bool) -> Iterator[Recipe]:
    """What is measured, the one that all are judged by first.

    Raises:
        UserError: nothing is searched for such a pipeline.
    """
    methods: list[Any] = [] if refine else [None]
    for kind in pipeline_methods():
        if ("guide" in kind.inputs) == refine:
            methods += kind.candidates(pipeline, quick)
    if not refine and not takes(pipeline, "image"):
        raise UserError(
            f"{type(pipeline).__name__} takes no reference pictures; with --refine it is searched how few steps a "
            "coarse picture needs."
        )
    most = own_steps(pipeline)
    fewer = [max(1, round(most * share)) for share in (_FEWER[1::2] if quick else _FEWER)]
    for steps in dict.fromkeys((most, *fewer)):
        for method in methods:
            yield Recipe.of(*(() if method is None else (method,)), model=name, steps=steps)


def requests(pipeline: DiffusionPipeline, refine: bool, count: int) -> list[Request]:
    """Edits of pictures of the emoji sets, half of them told by a word where the pipeline knows such words, or with
    `refine` pictures that were made four times smaller."""
    side = int(pipeline.config.get("size", _SIDE))
    size = own_size(pipeline) or (side, side)
    emoji = load_emoji(min(*size, 64))
    concepts, found = emoji.concepts(held_out=True).tolist()[:count], []
    kinds = (BY_WORD, BY_EXAMPLE) if "patch" in pipeline.config else (BY_EXAMPLE,)
    several = isinstance(denoiser(pipeline), Flux2Transformer2DModel)  # others take several pictures for a batch
    for number, concept in enumerate(concepts):
        batch = draw(emoji, kinds[number % len(kinds)], [concept], np.random.default_rng(number))
        if refine:
            coarse = GUIDES["low resolution"].guide(batch.target)[0]
            found.append(Request(batch.prompts[0], guide=to_picture(coarse).resize(size)))
            continue
        pictures = [to_picture(pixels).resize(size) for pixels in batch.references[0]]
        found.append(Request(batch.prompts[0], tuple(pictures if several else pictures[:1])))
    return found


def optimize_pipeline(
    name: str,
    pipeline: DiffusionPipeline,
    max_loss: float,
    journal: Journal,
    refine: bool = False,
    quick: bool = False,
    minutes: float = 8.0,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Outcome:
    """Measure recipes for a pipeline.

    Args:
        name: of it, for the recipes.
        max_loss: 1 - SSIM that the best recipe may have.
        journal: of what was measured; it is not measured again.
        refine: coarse pictures are refined, not references edited.
        minutes: nothing new is begun after them.
        progress: called with (label, recipes measured, recipes).

    Raises:
        UserError: nothing is searched for such a pipeline.
        KeyboardInterrupt: before anything was measured.
    """
    todo, found, untried = list(recipes(name, pipeline, refine, quick)), list[Measured](), list[str]()
    end, asked = time.monotonic() + 60 * minutes, requests(pipeline, refine, 4 if quick else 10)
    key = scope_of(name, len(asked), refine, fingerprint(denoiser(pipeline)), str(dict(pipeline.config)))
    wanted: list[torch.Tensor] = []
    interrupted = False
    for number, recipe in enumerate(todo):
        progress(recipe.label, number, len(todo))
        identity = f"{key} {recipe.identity}"
        if identity not in journal:
            if interrupted or (number and time.monotonic() > end):
                untried.append(recipe.label)
                continue
            try:
                wanted = wanted or _drawn(pipeline, todo[0], asked)[0]
                pictures, seconds = _drawn(pipeline, recipe, asked)
            except KeyboardInterrupt:
                if not found:
                    raise
                interrupted = True
                untried.append(recipe.label)
                continue
            losses = [1 - _ssim(one, other) for one, other in zip(pictures, wanted, strict=True)]
            journal.add(identity, {"losses": losses, "seconds": seconds})
        record = journal[identity]
        found.append(Measured(recipe, np.asarray(record["losses"]), np.asarray(record["seconds"])))
    progress("done", len(todo), len(todo))
    return Outcome(found, max_loss, untried, refine, interrupted)


def _drawn(
    pipeline: DiffusionPipeline, recipe: Recipe, asked: Sequence[Request]
) -> tuple[list[torch.Tensor], list[float]]:
    """A picture for each request, and the seconds that it took."""
    pictures, seconds = [], []
    refines = asked[0].guide is not None
    # What a block does once is not counted in every request, but for a guide there is a block for each.
    with quiet(pipeline), nullcontext() if refines else recipe.drawing(pipeline):
        for request in asked:
            begin = time.perf_counter()
            width, height = (None, None) if request.guide is None else request.guide.size
            given = arguments(
                pipeline, image=list(request.references) or None, num_inference_steps=recipe.steps, height=height,
                width=width, generator=torch.Generator().manual_seed(0),
                prompt=request.prompt if takes(pipeline, "prompt") else None,
            )  # fmt: skip
            with recipe.drawing(pipeline, guide=request.guide) if refines else nullcontext():
                picture = pipeline(**given).images[0]
            seconds.append(time.perf_counter() - begin)
            pictures.append(to_pixels(picture))
    return pictures, seconds


def _ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    found = structural_similarity_index_measure(one[None], other[None], data_range=(-1.0, 1.0))
    return float(torch.as_tensor(found))
