"""Scales, minima and codes of groups of weights, and round-to-nearest.

A value is `scale * (code - zero) + min`. Scales and minima are rounded to fp16, as they are stored, before codes are
chosen, so that no error is made that the choice did not see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lissom.kernels.packed import Packed, pack_codes

_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """The codes of a packed format: `low` to `high`, `zero` stands for 0 (or for `min`, where groups have one)."""

    format: str
    low: int
    high: int
    zero: int
    has_min: bool = False


GRIDS = {
    "q8": Grid("q8", 1, 255, 128),
    "q4": Grid("q4", 0, 15, 8),
    "q4_min": Grid("q4_min", 0, 15, 0, has_min=True),
}


@dataclass
class Coded:
    """A quantised matrix.

    Attributes:
        grid: what the codes mean.
        group: inputs that share a scale.
        codes: uint8 `[rows, columns]`.
        scales: fp16 `[rows, ceil(columns / group)]`; a negative scale mirrors the codes.
        mins: as `scales`, or None where the grid has none.
    """

    grid: Grid
    group: int
    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None

    def values(self) -> torch.Tensor:
        """The weights that it stands for, fp32 `[rows, columns]`."""
        scales, mins = (
            None if part is None else part.float().repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]
            for part in (self.scales, self.mins)
        )
        assert scales is not None
        values = scales * (self.codes.float() - self.grid.zero)
        return values if mins is None else values + mins

    def pack(self) -> Packed:
        """In the layout of the kernels."""
        return pack_codes(self.codes, self.scales, self.mins, self.grid.format, self.group)


def grouped(values: torch.Tensor, group: int) -> torch.Tensor:
    """`[..., columns]` to `[..., groups, group]`; what is missing in the last group is zero."""
    return F.pad(values, (0, -values.shape[-1] % group)).unflatten(-1, (-1, group))


def nearest(weight: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The codes whose values are next to `weight`, in its dtype; `scale` and `low` (the minimum) broadcast to it."""
    steps = torch.where(scale == 0, torch.zeros_like(scale), (weight - low) / scale)
    return (steps.round() + grid.zero).clamp_(grid.low, grid.high)


def to_fp16(values: torch.Tensor) -> torch.Tensor:
    """Rounded to what fp16 can store."""
    return values.clamp(-_FP16_MAX, _FP16_MAX).half().to(values.dtype)


def covering(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum `[..., groups, 1]` that reach from one end of each group `[..., groups, group]` to the other.

    A symmetric group's largest weight gets the code that is farthest from zero, whatever its sign, as in GGUF's Q4_0.
    """
    if grid.has_min:
        low = to_fp16(weight.amin(-1, keepdim=True))
        return to_fp16((weight.amax(-1, keepdim=True) - low) / (grid.high - grid.low)), low
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    return to_fp16(largest / (grid.low - grid.zero)), torch.zeros_like(largest)


def rtn(weight: torch.Tensor, grid: Grid, group: int) -> Coded:
    """Round to nearest, on the scale that covers each group.

    Args:
        weight: `[rows, columns]`.
        group: inputs that share a scale.
    """
    blocks = grouped(weight.float(), group)
    if weight.shape[1] % group:  # the padding must not widen the last group's range
        blocks[:, -1, weight.shape[1] % group :] = blocks[:, -1, :1]
    scale, low = covering(blocks, grid)
    return from_blocks(nearest(blocks, scale, low, grid), scale, low, grid, weight.shape[1])


def from_blocks(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, grid: Grid, columns: int) -> Coded:
    """A matrix of `columns` from the codes `[rows, groups, group]` and the scales and minima `[rows, groups, 1]`."""
    group = codes.shape[-1]
    mins = low[..., 0].half() if grid.has_min else None
    return Coded(grid, group, codes.flatten(1)[:, :columns].to(torch.uint8), scale[..., 0].half(), mins)
