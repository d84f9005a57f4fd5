"""How well a model edits: what it draws of concepts that it has not seen, beside what there was to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from lissom.diffusion.demo import BY_EXAMPLE, BY_WORD, Emoji, Kind, draw
from lissom.diffusion.demo.model import new_pipeline
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.diffusion.demo.task import edited, scaled
from lissom.diffusion.load import load_pipeline
from lissom.diffusion.pictures import quiet, to_picture, to_pixels
from lissom.errors import UserError
from lissom.evals.judge import Judge, feature_distance
from lissom.train.dit import DitConfig, Form, make_cacheable, train_dit

Progress = Callable[[int, int], None]
METRICS = ("psnr", "ssim", "distance", "recognised", "style")
KINDS = {"by a word": BY_WORD, "by an example": BY_EXAMPLE}


def trained(folder: Path, form: Form, references: str, emoji: Emoji, progress: Progress) -> PixelEditPipeline:
    """The editing model in `folder`, which is trained there where it is not, or not to its end."""
    if not (folder / "model_index.json").is_file():
        pipeline = new_pipeline(replace(form.shape, references=references), emoji, form.config.seed)
        train_dit(pipeline, form.config, emoji, folder, progress)
    return loaded(folder)


def cacheable(
    folder: Path, base: Path, config: DitConfig, emoji: Emoji, progress: Progress, rank: int | None = None
) -> PixelEditPipeline:
    """The model in `base` after a short training in `folder`, behind which its references see each other alone."""
    if not (folder / "model_index.json").is_file():
        pipeline = loaded(base)
        make_cacheable(pipeline, "set", rank)
        train_dit(pipeline, config, emoji, folder, progress)
    return loaded(folder)


def loaded(model: str | Path) -> PixelEditPipeline:
    """The editing model in a folder.

    Raises:
        UserError: it is another one.
    """
    pipeline = load_pipeline(str(model))
    if not isinstance(pipeline, PixelEditPipeline):
        raise UserError(f"{model} is a {type(pipeline).__name__}: expected a model of `lissom train-dit`, or none.")
    return pipeline


@torch.no_grad()
def edits(
    pipeline: PixelEditPipeline,
    emoji: Emoji,
    kind: Kind,
    concepts: Sequence[int],
    steps: int,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> torch.Tensor:
    """What is drawn of a request of that kind for each concept: `[concepts, 3, size, size]`.

    Args:
        options: of the pipeline's call.
    """
    batch, drawn = draw(emoji, kind, concepts, np.random.default_rng(0)), []
    with quiet(pipeline):
        for number, concept in enumerate(concepts):
            references = [to_picture(pixels) for pixels in batch.references[number]]
            random = torch.Generator().manual_seed(concept)
            prompt = batch.prompts[number]
            picture = pipeline(references, prompt, num_inference_steps=steps, generator=random, **options).images[0]
            drawn.append(to_pixels(picture))
            progress(number + 1, len(concepts))
    return torch.stack(drawn)


@torch.no_grad()
def scores(
    drawn: torch.Tensor, emoji: Emoji, kind: Kind, judge: Judge, concepts: Sequence[int]
) -> dict[str, list[float]]:
    """Of each picture of `edits`: PSNR in dB, SSIM, the distance of what `judge` sees (1 - cosine), whether what there
    was to draw is the nearest of all held-out concepts drawn so, and whether `judge` takes both for one style.
    """
    batch = draw(emoji, kind, concepts, np.random.default_rng(0))
    wanted, everything = batch.target, emoji.concepts(held_out=True)
    logits, places = judge(drawn)
    known: dict[tuple[int, str], torch.Tensor] = {}
    near = []
    for place, style, word in zip(places, batch.style.tolist(), batch.edits, strict=True):
        if (style, word) not in known:
            others = scaled(emoji.pictures[style, everything])
            known[style, word] = judge(torch.stack([edited(other, word) for other in others]))[1]
        near.append(int((known[style, word] @ place).argmax()))
    found = {
        "psnr": psnr(drawn, wanted),
        "ssim": structural_similarity_index_measure(drawn, wanted, data_range=(-1.0, 1.0), reduction="none"),
        "distance": feature_distance(judge.features(drawn), judge.features(wanted)),
        "recognised": (everything[near] == batch.concept).float(),
        "style": (logits.argmax(1) == judge(wanted)[0].argmax(1)).float(),
    }
    return {name: values.tolist() for name, values in found.items()}


def psnr(drawn: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """In dB, of each of `[pictures, 3, height, width]`, -1 to 1."""
    return 10 * torch.log10(4 / (drawn - wanted).square().mean((1, 2, 3)).clamp(min=1e-10))
