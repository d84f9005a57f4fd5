"""Brings a guide to where a pipeline samples: pixels, patches of pixels, or latents of its autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image

from lissom.diffusion.pictures import to_pixels
from lissom.errors import UserError

Guide: TypeAlias = Image.Image | Sequence[Image.Image] | torch.Tensor


@dataclass(frozen=True)
class Space:
    """How a pipeline's samples relate to pictures.

    Attributes:
        encode: `[batch, 3, height, width]`, -1 to 1, to a grid `[batch, channels, rows, columns]`.
        pack: the grid as a sample.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    pack: Callable[[torch.Tensor], torch.Tensor]


def space_of(pipeline: DiffusionPipeline, dimensions: int) -> Space:
    """The space in which `pipeline` samples.

    Args:
        dimensions: of its samples: 4 for grids, 3 for tokens.

    Raises:
        UserError: it is none that is known.
    """
    vae = getattr(pipeline, "vae", None)
    if dimensions == 4:
        return Space((lambda pixels: pixels) if vae is None else (lambda pixels: _latents(vae, pixels)), _same)
    if dimensions == 3 and vae is None and "patch" in pipeline.config:
        patch = pipeline.config.patch
        return Space(lambda pixels: F.pixel_unshuffle(pixels, patch), _rows)
    if dimensions == 3 and hasattr(vae, "bn"):  # FLUX.2
        return Space(lambda pixels: pipeline._encode_vae_image(pixels, None), _rows)
    if dimensions == 3 and vae is not None and hasattr(pipeline, "_pack_latents"):  # FLUX.1
        return Space(lambda pixels: _latents(vae, pixels), lambda grid: pipeline._pack_latents(grid, *grid.shape))
    raise UserError(
        f"It is not known how {type(pipeline).__name__} lays out pictures of {dimensions} dimensions: give the guide "
        "as a tensor like its latents."
    )


def to_sample(pipeline: DiffusionPipeline, guide: Guide, sample: torch.Tensor) -> torch.Tensor:
    """A guide like `sample`, in fp32.

    Args:
        guide: a picture for all rows, one for each, or what they would be as a sample. Of tokens only the number is
            known: a picture of another shape with as many of them is not noticed.

    Raises:
        UserError: its size or number is another, or it has entries that are not finite.
    """
    if isinstance(guide, torch.Tensor):
        given = guide
    else:
        pictures = list(guide) if isinstance(guide, Sequence) else [guide]
        pixels = [to_pixels(picture) for picture in pictures]
        if len({own.shape for own in pixels}) != 1:
            raise UserError("Expected a guide, or several of one size.")
        space = space_of(pipeline, sample.ndim)
        given = space.pack(_grid(pipeline, space, torch.stack(pixels).to(sample.device), "guide"))
    if not given.isfinite().all():
        raise UserError("The guide has entries that are not finite.")
    if given.shape[1:] != sample.shape[1:] or not given.shape[0] or sample.shape[0] % given.shape[0]:
        raise UserError(
            f"A guide of shape {tuple(given.shape)} cannot guide samples of {tuple(sample.shape)}: give one of the "
            "size that is drawn, for all pictures or for each."
        )
    return given.to(sample.device, torch.float32).repeat_interleave(sample.shape[0] // given.shape[0], 0)


def region(pipeline: DiffusionPipeline, mask: Image.Image, sample: torch.Tensor) -> torch.Tensor:
    """A mask like `sample`, 0 to 1: how much of each entry it covers.

    Args:
        mask: white where it covers.

    Raises:
        UserError: its size is another than that of what is drawn.
    """
    if not isinstance(mask, Image.Image):
        raise UserError(f"A mask is a {type(mask).__name__}: expected a picture of PIL.")
    space = space_of(pipeline, sample.ndim)
    pixels = torch.from_numpy(np.array(mask.convert("L"))).float()[None, None].expand(1, 3, -1, -1) / 255
    grid = _grid(pipeline, space, pixels.to(sample.device), "mask")
    if getattr(pipeline, "vae", None) is not None:  # latents have no places within an entry
        grid = F.interpolate(pixels[:, :1], grid.shape[2:], mode="area").to(grid).expand_as(grid)
    spread = space.pack(grid)
    if spread.shape[1:] != sample.shape[1:]:
        raise UserError(
            f"A mask of {mask.size[0]} by {mask.size[1]} pixels does not fit what is drawn: give one of its size."
        )
    return spread.to(sample.device, torch.float32)


@torch.no_grad()
def _grid(pipeline: DiffusionPipeline, space: Space, pixels: torch.Tensor, what: str) -> torch.Tensor:
    """Pictures in the space in which a pipeline samples."""
    height, width = pixels.shape[2:]
    try:
        grid = space.encode(pixels.to(_dtype(pipeline)))
    except (RuntimeError, ValueError) as error:  # of an autoencoder
        raise UserError(f"A {what} of {width} by {height} pixels does not fit this pipeline: {error}.") from error
    if height % grid.shape[2] or width % grid.shape[3]:
        raise UserError(f"A {what} of {width} by {height} pixels does not fit this pipeline: give one of its sizes.")
    return grid


def _latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    found = vae.encode(pixels)
    latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latent
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def _same(grid: torch.Tensor) -> torch.Tensor:
    return grid


def _rows(grid: torch.Tensor) -> torch.Tensor:
    """`[batch, channels, rows, columns]` to `[batch, rows * columns, channels]`."""
    return grid.flatten(2).transpose(1, 2)


def _dtype(pipeline: DiffusionPipeline) -> torch.dtype:
    vae = getattr(pipeline, "vae", None)
    return torch.float32 if vae is None else vae.dtype
