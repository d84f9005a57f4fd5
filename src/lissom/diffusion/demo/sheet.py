"""Sheets of pictures: what was shown, what was drawn, and what there was to draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from lissom.diffusion.demo.emoji import Emoji
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.diffusion.demo.task import Kind, draw
from lissom.diffusion.pictures import quiet, to_picture

_SCALE = 2  # times the size of a picture
EDIT = Kind(1, 1, "none", 0.0)


def sheet(
    pipeline: PixelEditPipeline,
    emoji: Emoji,
    concepts: Sequence[int],
    kind: Kind = EDIT,
    steps: int = 20,
    seed: int = 0,
) -> Image.Image:
    """A row for each concept: its references, what the pipeline draws, and the concept in the style."""
    batch = draw(emoji, kind, concepts, np.random.default_rng(seed))
    rows = []
    with quiet(pipeline):
        for number, prompt in enumerate(batch.prompts):
            references = [to_picture(pixels) for pixels in batch.references[number]]
            drawn = pipeline(
                references or None, prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)
            ).images[0]
            rows.append([*references, drawn, to_picture(batch.target[number])])
    size = emoji.size * _SCALE
    whole = Image.new("RGB", (size * len(rows[0]), size * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, one in enumerate(row):
            whole.paste(one.resize((size, size), Image.Resampling.NEAREST), (left * size, top * size))
    return whole
