"""Fidelity against quality: how far apart two sets of pictures are, and what a method's points dominate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def area(points: Sequence[tuple[float, float]], corner: tuple[float, float]) -> float:
    """What points of (fidelity, higher is better; distance, lower is better) dominate, up to a corner."""
    total, best = 0.0, corner[1]
    for fidelity, distance in sorted(points, reverse=True):
        if fidelity > corner[0] and distance < best:
            total += (fidelity - corner[0]) * (best - distance)
            best = distance
    return total


class KernelDistance:
    """Squared distance of two distributions by the kernel `(x y / d + 1)³`, without bias (KID, arXiv 1801.01401).

    Args:
        ours, theirs: samples of them, `[n, d]`; they may be fewer than they have entries.
    """

    def __init__(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        self.own, self.both = _kernel(ours, ours), _kernel(ours, theirs)
        self.other = _without_diagonal(_kernel(theirs, theirs))

    def of(self, rows: np.ndarray) -> float:
        """Of some of `ours`, each at most once."""
        return _without_diagonal(self.own[np.ix_(rows, rows)]) + self.other - 2 * float(self.both[rows].mean())


def _kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    found: np.ndarray = (one @ other.T / one.shape[1] + 1) ** 3
    return found


def _without_diagonal(kernel: np.ndarray) -> float:
    count = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
