"""How good a prior is: errors, and whether what it expects comes true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lissom.errors import UserError

_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Prompts whose expected rewards are alike.

    Attributes:
        expected, found: mean expected reward, and mean reward.
        prompts: how many.
    """

    expected: float
    found: float
    prompts: int


@dataclass(frozen=True)
class Calibration:
    """Of a prior's expectations.

    Attributes:
        error: mean squared difference to the mean rewards, less what the noise of those makes of it.
        brier: mean squared difference to single rewards, on a scale of 0 to 1: for rewards of 0 and 1 the Brier score.
        bias: mean difference.
        correlation: of expected and mean rewards; 0 where one of them is the same everywhere.
        reliability: of prompts sorted by expectation.
        by_step: `error` of each step, in order.
        accepted: share of prompts whose mean is within one deviation of what was expected.
    """

    error: float
    brier: float
    bias: float
    correlation: float
    reliability: tuple[Bin, ...]
    by_step: tuple[float, ...]
    accepted: float


def calibrate(
    expected: Sequence[float],
    means: Sequence[float],
    sizes: Sequence[int],
    squares: Sequence[float],
    steps: Sequence[int],
    low: float,
    high: float,
) -> Calibration:
    """Compare expectations with outcomes, all one number per prompt.

    Args:
        means, squares: of a prompt's rewards, and of their squares.
        sizes: rollouts.
        steps: in which it was met.

    Raises:
        UserError: there are none, or not as many of each.
    """
    e, m, k, s = (np.asarray(values, dtype=float) for values in (expected, means, sizes, squares))
    step = np.asarray(steps)
    if not len(e) or not len(e) == len(m) == len(k) == len(s) == len(step):
        raise UserError("Expected as many expectations as outcomes, at least one.")
    variance = np.where(k > 1, (s - m**2).clip(0) / np.maximum(k - 1, 1), (high - low) ** 2 / 4)
    off = (e - m) ** 2
    single = (s - 2 * e * m + e**2) / (high - low) ** 2
    order = np.argsort(e, kind="stable")
    parts = [part for part in np.array_split(order, min(_BINS, len(order))) if len(part)]
    bins = tuple(Bin(float(e[part].mean()), float(m[part].mean()), len(part)) for part in parts)
    varied = min(e.std(), m.std()) > 1e-9
    return Calibration(
        float((off - variance).mean()),
        float(np.average(single, weights=k)),
        float((e - m).mean()),
        float(np.corrcoef(e, m)[0, 1]) if varied else 0.0,
        bins,
        tuple(float((off - variance)[step == own].mean()) for own in dict.fromkeys(step.tolist())),
        float((off <= (high - low) ** 2 / 4 / k).mean()),
    )
