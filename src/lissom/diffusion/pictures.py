"""Pictures of PIL as tensors and as sheets, and pipelines that draw without a bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from lissom.errors import UserError
from lissom.files import atomic_path


def to_pixels(picture: Any) -> torch.Tensor:
    """`[3, height, width]`, -1 to 1; on white where it is transparent.

    Raises:
        UserError: it is no picture of PIL, or has more than 8 bits.
    """
    if not isinstance(picture, Image.Image):
        raise UserError(f"Got a {type(picture).__name__}: expected a picture of PIL.")
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        raise UserError(f"A picture of mode {picture.mode} has more than 8 bits: give one of 8 bits for each channel.")
    if picture.mode in ("RGBA", "LA", "P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def to_picture(pixels: torch.Tensor) -> Image.Image:
    """Of `[3, height, width]`, -1 to 1."""
    return Image.fromarray(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())


def write_picture(picture: Image.Image, file: Path) -> None:
    """Whole or not at all, in the format that the file's ending names."""
    with atomic_path(file) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[file.suffix.lower()])


def rows_of(columns: Sequence[torch.Tensor | None], count: int) -> list[list[Image.Image | None]]:
    """`count` rows for `tiled`, of columns `[pictures, 3, height, width]`, -1 to 1, of which some may be empty."""
    return [[None if column is None else to_picture(column[row]) for column in columns] for row in range(count)]


def tiled(
    rows: Sequence[Sequence[Image.Image | None]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    side: int = 64,
) -> Image.Image:
    """Rows of pictures on one sheet.

    Args:
        rows: None leaves a place empty.
        columns, names: what is written above the columns, and to the left of the rows.
        side: pixels of a side of a tile, to which pictures are enlarged without smoothing.
    """
    font = ImageFont.load_default(11)
    headings = [wrap(heading, side // 6) for heading in columns]
    top = 14 * max(map(len, headings), default=0)
    left = max((int(font.getlength(name)) + 8 for name in names), default=0)
    sheet = Image.new("RGB", (left + side * max(map(len, rows)), top + side * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, lines in enumerate(headings):
        for line, words in enumerate(lines):
            pen.text((left + side * (number + 0.5), 14 * line + 7), words, "black", font, anchor="mm")
    for number, name in enumerate(names):
        pen.text((4, top + side * (number + 0.5)), name, "black", font, anchor="lm")
    for down, row in enumerate(rows):
        for across, picture in enumerate(row):
            if picture is not None:
                tile = picture.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(tile, (left + side * across, top + side * down))
    return sheet


@contextmanager
def quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Without its progress bars, which are as they were when the block ends."""
    bars = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**bars | {"disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**bars)
