"""The search for scales and minima that weighs errors by the inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lissom.kernels.rounding import Coded, Grid, covering, from_blocks, grouped, nearest, rtn, to_fp16

_CHUNK = 1 << 20  # weights that are searched at once
# Scales that are tried, as shares of the one that just covers the group.
_FACTORS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
_CUTS = (0.0, 0.25, 0.5, 0.75, 1.0)  # how much of what a narrower scale cuts off is cut off at the lower end


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
    return from_blocks(codes, scale, low, grid, weight.shape[1])


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
    scale, low = covering(weight, grid)
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
        scale = to_fp16(torch.where(squares > 0, products / squares, 0.0))
        return scale, torch.zeros_like(scale)
    total, sums = share.sum(-1, keepdim=True), weighted.sum(-1, keepdim=True)
    means = (share * weight).sum(-1, keepdim=True)
    determinant = total * squares - sums * sums
    scale = to_fp16(
        torch.where(determinant > 1e-6 * total * squares, (total * products - sums * means) / determinant, 0)
    )
    return scale, to_fp16((means - scale * sums) / total)
