"""Intervals for paired measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval."""

    estimate: float
    low: float
    high: float

    def __neg__(self) -> Interval:
        """Of the negative."""
        return Interval(-self.estimate, -self.high, -self.low)


def signed(gap: Interval, form: str = "+.3f") -> str:
    """A difference with its interval."""
    return f"{gap.estimate:{form}} [{gap.low:{form}}, {gap.high:{form}}]"


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


def mean_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Mean with Student's interval: of a few units, such as seeds, a bootstrap would say too little."""
    known = np.asarray(values, dtype=float)
    if known.ndim != 1 or len(known) < 2:
        raise ValueError(f"Expected at least two units, got an array of shape {known.shape}.")
    half = float(student.ppf((1 + level) / 2, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
    mean = float(known.mean())
    return Interval(mean, mean - half, mean + half)


def geometric_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Geometric mean of positive values with Student's interval of their logarithms."""
    found = mean_interval(np.log(values), level)
    return Interval(float(np.exp(found.estimate)), float(np.exp(found.low)), float(np.exp(found.high)))


def median_interval(values: Sequence[float], samples: int = 4000, level: float = 0.95, seed: int = 0) -> Interval:
    """Median with its percentile bootstrap interval; of few values that is next to their range."""
    known = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(known), (samples, len(known)))
    low, high = np.quantile(np.median(known[draws], 1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(known)), float(low), float(high))


def ratio_interval(
    above: Sequence[float], below: Sequence[float], samples: int = 4000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Median of `above` / median of `below`, positive values of the same rounds, with its bootstrap interval over
    rounds; where their numbers differ they are drawn apart."""
    one, other = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    random = np.random.default_rng(seed)
    first = random.integers(0, len(one), (samples, len(one)))
    second = first if len(one) == len(other) else random.integers(0, len(other), (samples, len(other)))
    ratios = np.median(one[first], 1) / np.median(other[second], 1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.median(one) / np.median(other)), float(low), float(high))


def verdict(differences: Sequence[Interval], most: float = 0.0, strict: bool = False) -> str:
    """What a claim comes to that each of `differences` (or ratios) is at most `most`, or `strict`ly below it.

    Returns:
        `holds`: by the upper ends of their intervals; `weaker`: by the estimates only; otherwise `does not hold`.
    """
    upper = max(difference.high for difference in differences)
    if upper < most or (upper == most and not strict):
        return "holds"
    return "weaker" if all(difference.estimate <= most for difference in differences) else "does not hold"
