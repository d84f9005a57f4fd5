"""By how many times fewer steps one training comes to a loss than another, from what was measured on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SMOOTHED = 3  # measurements that a smoothed one is the mean of
Curve = tuple[np.ndarray, np.ndarray]  # steps and losses


def smoothed(measured: Sequence[Sequence[float]], end: int) -> Curve:
    """Steps and losses up to `end`, each the mean of some measurements that follow each other."""
    points = np.array([entry for entry in measured if entry[0] <= end], dtype=float)
    width = min(_SMOOTHED, len(points))
    kernel = np.ones(width) / width
    return np.convolve(points[:, 0], kernel, "valid"), np.convolve(points[:, 1], kernel, "valid")


def first_step(curve: Curve, target: float) -> float | None:
    """The first step at which a curve is at `target` or below, interpolated; None where it never is."""
    steps, losses = curve
    below = np.flatnonzero(losses <= target)
    if not len(below):
        return None
    at = int(below[0])
    if at == 0:
        return float(steps[0])
    share = (losses[at - 1] - target) / (losses[at - 1] - losses[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def speedup(ours: Curve, theirs: Curve) -> float:
    """Steps of `theirs` to its best loss over those of ours to the same; where ours never comes there, the same of the
    other way round."""
    target = float(theirs[1].min())
    reached = first_step(ours, target)
    if reached is not None:
        return float(first_step(theirs, target)) / reached  # type: ignore[arg-type]
    best = float(ours[1].min())
    return float(first_step(theirs, best)) / float(first_step(ours, best))  # type: ignore[arg-type]
