"""Bounds from a table, at next to the cost of a fixed clip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lissom.kernels.interpolation import interpolate, reference, rows_of
from lissom.rl.band.bounds import ratio_bounds
from lissom.rl.band.divergences import Divergence

INTERVALS = 8192
END = 6.0  # sqrt(-log p): down to p = 2e-16
_POINTS = 8  # of each interval, where the table is compared with the solver
_OPEN = (1.0, 1.0, math.inf)


@dataclass(frozen=True)
class BandTable:
    """The bounds of one divergence and radius.

    Attributes:
        rows: of `lissom.kernels.interpolation`.
        lower_error: the most by which the lower bound, from 0 to 1, is off at 8 points of each interval, up to
            p = 1 - 1e-6.
        upper_error: the same of the upper bound, as a share of it.
    """

    rows: Tensor
    lower_error: float
    upper_error: float

    def __call__(
        self, logp: Tensor, cap: float | None = None, relax: tuple[float, float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `lissom.rl.band.band`."""
        below, above = relax or (0.0, 0.0)
        most = math.inf if cap is None else cap
        return interpolate(logp, self.rows.to(logp.device), END, (1 - below, min(1 + above, most), most))


@lru_cache(maxsize=16)
def table_of(divergence: str | Divergence, radius: float) -> BandTable:
    """The table of a divergence at a radius, made once (a second or less) and compared with the solver."""
    nodes = torch.linspace(0, END, INTERVALS * _POINTS + 1, dtype=torch.float64)
    logs = -nodes.square()
    lower, upper = ratio_bounds(logs, divergence, radius)
    rows = rows_of(lower[::_POINTS], upper[::_POINTS])
    low, high = reference(logs.float(), rows, END, _OPEN)
    seen = logs < -1e-6
    off = (low - lower).abs(), ((high - upper) / upper).abs()
    return BandTable(rows, *(float(errors[seen].max()) for errors in off))
