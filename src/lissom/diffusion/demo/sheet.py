"""Sheets of pictures: what was shown, what was drawn, and what there was to draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from lissom.diffusion.demo.emoji import Emoji
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.diffusion.demo.task import BY_EXAMPLE, BY_WORD, draw
from lissom.diffusion.pictures import quiet, tiled, to_picture


def sheet(
    pipeline: PixelEditPipeline,
    emoji: Emoji,
    concepts: Sequence[int],
    steps: int = 20,
    seed: int = 0,
) -> Image.Image:
    """A row for each concept: a picture that is edited by a word, what is drawn, and the picture after the edit; a
    picture and an example of a style, what is drawn, and the concept in that style."""
    rows: list[list[Image.Image]] = [[] for _ in concepts]
    with quiet(pipeline):
        for kind in (BY_WORD, BY_EXAMPLE):
            batch = draw(emoji, kind, concepts, np.random.default_rng(seed))
            for number, prompt in enumerate(batch.prompts):
                references = [to_picture(pixels) for pixels in batch.references[number]]
                random = torch.Generator().manual_seed(seed + number)
                drawn = pipeline(references, prompt, num_inference_steps=steps, generator=random).images[0]
                rows[number] += [*references, drawn, to_picture(batch.target[number])]
    return tiled(rows)
