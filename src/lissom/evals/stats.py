"""Intervals for paired measurements."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate with its bootstrap interval."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    ours: np.ndarray, theirs: np.ndarray | None = None, samples: int = 4000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of `ours`, or of `ours - theirs`, with its percentile bootstrap interval over the units (axis 0).

    Units must be what varies independently (documents or questions, not tokens).
    """
    values = np.asarray(ours, dtype=float) if theirs is None else np.asarray(ours, float) - np.asarray(theirs, float)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"Expected one number per unit, got an array of shape {values.shape}.")
    draws = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
