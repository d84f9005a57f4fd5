"""Scales, minima and codes of groups of weights: round-to-nearest, and the search that weighs errors by the inputs.

A value is `scale * (code - zero) + min`. Scales and minima are rounded to fp16, as they are stored, before codes are
chosen, so that no error is made that the choice did not see.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lissom.kernels.packed import Packed, pack_codes

_FP16_MAX = 65504.0
_CHUNK = 1 << 20  # weights that are searched at once
# Scales that are tried, as shares of the one that just covers the group.
_FACTORS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
_CUTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # how much of what a narrower scale cuts off is cut off at the lower end


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


def _half(values: torch.Tensor) -> torch.Tensor:
    """Rounded to what fp16 can store."""
    return values.clamp(-_FP16_MAX, _FP16_MAX).half().to(values.dtype)


def _covering(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum `[..., groups, 1]` that reach from one end of each group `[..., groups, group]` to the other.

    A symmetric group's largest weight gets the code that is farthest from zero, whatever its sign, as in GGUF's Q4_0.
    """
    if grid.has_min:
        low = _half(weight.amin(-1, keepdim=True))
        return _half((weight.amax(-1, keepdim=True) - low) / (grid.high - grid.low)), low
    largest = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))
    return _half(largest / (grid.low - grid.zero)), torch.zeros_like(largest)


def rtn(weight: torch.Tensor, grid: Grid, group: int) -> Coded:
    """Round to nearest, on the scale that covers each group.

    Args:
        weight: `[rows, columns]`.
        group: inputs that share a scale.
    """
    blocks = grouped(weight.float(), group)
    if weight.shape[1] % group:  # the padding must not widen the last group's range
        blocks[:, -1, weight.shape[1] % group :] = blocks[:, -1, :1]
    scale, low = _covering(blocks, grid)
    return _coded(nearest(blocks, scale, low, grid), scale, low, grid, weight.shape[1])


def search(weight: torch.Tensor, importance: torch.Tensor, grid: Grid, group: int) -> Coded:
    """The scale (and minimum) of each group with the least sum of `importance` times squared error that was found.

    From round-to-nearest and from a ladder of narrower and wider scales of both signs, each improved by weighted least
    squares given its codes. It is never worse than round-to-nearest under the same weighting.

    Args:
        weight: `[rows, columns]`.
        importance: `[columns]`, not negative: the mean square of each input.
    """
    # Ones where nothing is known of a whole group: its codes are then the nearest in the plain sense.
    share = grouped(importance.float(), group)
    share = torch.where(share.sum(-1, keepdim=True) > 0, share, grouped(torch.ones_like(importance).float(), group))
    share = share / share.amax(-1, keepdim=True)
    start = rtn(weight, grid, group)
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [
        _search(grouped(block.float(), group), share, first, grid)
        for block, first in zip(weight.split(rows), _split(start, rows), strict=True)
    ]
    codes, scale, low = (torch.cat(part) for part in zip(*parts, strict=True))
    return _coded(codes, scale, low, grid, weight.shape[1])


_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes [rows, groups, group], scale and minimum [.., 1]


def _split(coded: Coded, rows: int) -> list[_Found]:
    codes = grouped(coded.codes.float(), coded.group).split(rows)
    scales = coded.scales.float()[..., None]
    mins = torch.zeros_like(scales) if coded.mins is None else coded.mins.float()[..., None]
    return list(zip(codes, scales.split(rows), mins.split(rows), strict=True))


def _search(weight: torch.Tensor, share: torch.Tensor, best: _Found, grid: Grid) -> _Found:
    def error(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return ((codes - grid.zero).mul_(scale).add_(low).sub_(weight).square_() * share).sum(-1, keepdim=True)

    least = error(*best)
    for trial in [*_trials(weight, grid), None, None]:  # at the end the best one is refined twice more
        codes = best[0] if trial is None else nearest(weight, *trial, grid)
        fitted = _least_squares(weight, share, codes - grid.zero, grid)
        candidate = (nearest(weight, *fitted, grid), *fitted)
        new = error(*candidate)
        better = new < least
        least = torch.where(better, new, least)
        best = (
            torch.where(better, candidate[0], best[0]),
            torch.where(better, candidate[1], best[1]),
            torch.where(better, candidate[2], best[2]),
        )
    return best


def _trials(weight: torch.Tensor, grid: Grid) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Scales and minima to begin with: with a minimum, those that cut off one end or both."""
    scale, low = _covering(weight, grid)
    for factor in _FACTORS:
        trial = scale * factor
        if grid.has_min:
            cut = (scale - trial) * (grid.high - grid.low)
            yield from ((trial, low + share * cut) for share in (_CUTS if factor < 1 else (0.5,)))
            continue
        yield trial, low
        if grid.zero - grid.low != grid.high - grid.zero:  # the largest weight at the nearer end of the codes
            yield trial * ((grid.low - grid.zero) / (grid.high - grid.zero)), low


def _least_squares(
    weight: torch.Tensor, share: torch.Tensor, steps: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp16 scale and minimum with the least weighted error for these codes; zero where they are not determined."""
    weighted = steps * share
    squares, products = (weighted * steps).sum(-1, keepdim=True), (weighted * weight).sum(-1, keepdim=True)
    if not grid.has_min:
        scale = _half(torch.where(squares > 0, products / squares, 0.0))
        return scale, torch.zeros_like(scale)
    total, sums = share.sum(-1, keepdim=True), weighted.sum(-1, keepdim=True)
    means = (share * weight).sum(-1, keepdim=True)
    determinant = total * squares - sums * sums
    scale = _half(torch.where(determinant > 1e-6 * total * squares, (total * products - sums * means) / determinant, 0))
    return scale, _half((means - scale * sums) / total)


def _coded(codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor, grid: Grid, columns: int) -> Coded:
    group = codes.shape[-1]
    mins = low[..., 0].half() if grid.has_min else None
    return Coded(grid, group, codes.flatten(1)[:, :columns].to(torch.uint8), scale[..., 0].half(), mins)
