"""The main job for a diffusion model: fewer steps, and references that are read once, each measured on this machine."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from lissom.diffusion.demo import BY_EXAMPLE, BY_WORD, draw, load_emoji
from lissom.diffusion.klein_kv import KleinKV
from lissom.diffusion.klein_kv.apply import references_of
from lissom.diffusion.klein_kv.approximate import FAMILIES
from lissom.diffusion.klein_kv.hooks import fingerprint
from lissom.diffusion.pictures import quiet, to_picture, to_pixels
from lissom.errors import UserError
from lissom.evals.journal import Journal, scope_of
from lissom.evals.stats import Interval, paired_bootstrap
from lissom.recipes import Recipe

_FEWER = (0.6, 0.4, 0.3, 0.2)  # shares of the pipeline's own number of steps
_SIDE = 256  # pixels of the requests of pipelines that do not say


@dataclass(frozen=True)
class Request:
    """Reference pictures and a prompt."""

    references: tuple[Image.Image, ...]
    prompt: str


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
    """

    measured: list[Measured]
    max_loss: float
    untried: list[str]

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


def recipes(name: str, pipeline: DiffusionPipeline, quick: bool) -> Iterator[Recipe]:
    """What is measured, the untouched pipeline first."""
    methods: list[KleinKV | None] = [None]
    if references_of(pipeline) != "joint":
        methods += [KleinKV(), KleinKV(storage="int8")]
    elif isinstance(getattr(pipeline, "transformer", None), tuple(FAMILIES)):
        methods += [KleinKV(mode="approximate"), KleinKV(mode="approximate", refresh_every=3)]
    most = own_steps(pipeline)
    fewer = [max(1, round(most * share)) for share in (_FEWER[1::2] if quick else _FEWER)]
    for steps in dict.fromkeys((most, *fewer)):
        for method in methods:
            yield Recipe.of(*(() if method is None else (method,)), model=name, steps=steps)


def own_steps(pipeline: DiffusionPipeline) -> int:
    """Steps that a pipeline takes where nothing is said.

    Raises:
        UserError: it takes no reference pictures.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    if not {"image", "num_inference_steps"} <= known.keys():
        raise UserError(
            f"{type(pipeline).__name__} takes no reference pictures: there is nothing that is searched for it."
        )
    return int(known["num_inference_steps"].default)


def requests(pipeline: DiffusionPipeline, count: int) -> list[Request]:
    """Edits of pictures of the emoji sets, half of them told by a word where the pipeline knows such words."""
    side = pipeline.config.get("size", _SIDE)
    emoji = load_emoji(min(side, 64))
    concepts, found = emoji.concepts(held_out=True).tolist()[:count], []
    kinds = (BY_WORD, BY_EXAMPLE) if "patch" in pipeline.config else (BY_EXAMPLE,)
    for number, concept in enumerate(concepts):
        batch = draw(emoji, kinds[number % len(kinds)], [concept], np.random.default_rng(number))
        pictures = [to_picture(pixels).resize((side, side)) for pixels in batch.references[0]]
        found.append(Request(tuple(pictures), batch.prompts[0]))
    return found


def optimize_pipeline(
    name: str,
    pipeline: DiffusionPipeline,
    max_loss: float,
    journal: Journal,
    quick: bool = False,
    minutes: float = 8.0,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
) -> Outcome:
    """Measure recipes for a pipeline.

    Args:
        name: of it, for the recipes.
        max_loss: 1 - SSIM that the best recipe may have.
        journal: of what was measured; it is not measured again.
        minutes: nothing new is begun after them.
        progress: called with (label, recipes measured, recipes).

    Raises:
        UserError: the pipeline takes no reference pictures.
    """
    own_steps(pipeline)
    end, asked = time.monotonic() + 60 * minutes, requests(pipeline, 4 if quick else 10)
    todo, found, untried = list(recipes(name, pipeline, quick)), list[Measured](), list[str]()
    key = scope_of(name, len(asked), references_of(pipeline), fingerprint(pipeline.transformer))
    identities = [f"{key} {recipe.identity}" for recipe in todo]
    wanted: list[torch.Tensor] = []
    if any(identity not in journal for identity in identities):
        wanted = [_drawn(pipeline, todo[0], request)[0] for request in asked]
    for number, (recipe, identity) in enumerate(zip(todo, identities, strict=True)):
        progress(recipe.label, number, len(todo))
        if identity not in journal:
            if number and time.monotonic() > end:
                untried.append(recipe.label)
                continue
            pictures, seconds = zip(*(_drawn(pipeline, recipe, request) for request in asked), strict=True)
            losses = [1 - _ssim(one, other) for one, other in zip(pictures, wanted, strict=True)]
            journal.add(identity, {"losses": losses, "seconds": list(seconds)})
        record = journal[identity]
        found.append(Measured(recipe, np.asarray(record["losses"]), np.asarray(record["seconds"])))
    progress("done", len(todo), len(todo))
    return Outcome(found, max_loss, untried)


def _drawn(pipeline: DiffusionPipeline, recipe: Recipe, request: Request) -> tuple[torch.Tensor, float]:
    """A picture, and the seconds that it took."""
    method = recipe.pipeline_method(KleinKV.name)
    begin = time.perf_counter()
    with nullcontext() if method is None else method(pipeline), quiet(pipeline):
        picture = pipeline(
            image=list(request.references), prompt=request.prompt, num_inference_steps=recipe.steps,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
    return to_pixels(picture), time.perf_counter() - begin


def _ssim(one: torch.Tensor, other: torch.Tensor) -> float:
    found = structural_similarity_index_measure(one[None], other[None], data_range=(-1.0, 1.0))
    return float(torch.as_tensor(found))
