"""Sheets of pictures: what was shown, what was drawn, and what there was to draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from lissom.diffusion.demo.emoji import Emoji
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.diffusion.demo.task import Kind, draw

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
    bars, pipeline._progress_bar_config = getattr(pipeline, "_progress_bar_config", {}), {"disable": True}
    rows = []
    for number, prompt in enumerate(batch.prompts):
        references = [picture(pixels) for pixels in batch.references[number]]
        drawn = pipeline(
            references or None, prompt, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed)
        ).images[0]
        rows.append([*references, drawn, picture(batch.target[number])])
    pipeline._progress_bar_config = bars
    size = emoji.size * _SCALE
    whole = Image.new("RGB", (size * len(rows[0]), size * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, one in enumerate(row):
            whole.paste(one.resize((size, size), Image.Resampling.NEAREST), (left * size, top * size))
    return whole


def picture(pixels: torch.Tensor) -> Image.Image:
    """Of `[3, height, width]`, -1 to 1."""
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
