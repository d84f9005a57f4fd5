"""Steps to a loss, by curves whose crossings are known."""

from __future__ import annotations

import numpy as np

from lissom.evals.targets import first_step, smoothed, speedup


def curve(*losses: float):
    return np.arange(1, len(losses) + 1) * 10.0, np.array(losses)


def test_steps_to_a_target_are_interpolated():
    assert first_step(curve(5, 4, 3), 3.5) == 25
    assert first_step(curve(5, 4, 3), 4) == 20
    assert first_step(curve(5, 4, 3), 6) == 10
    assert first_step(curve(5, 4, 3), 2) is None


def test_speedups_are_ratios_of_steps_either_way():
    theirs = curve(5, 4, 3)
    assert speedup(curve(4, 3, 2), theirs) == 30 / 20
    assert speedup(theirs, curve(4, 3, 2)) == 20 / 30
    assert speedup(theirs, theirs) == 1


def test_smoothed_curves_are_means_of_what_was_measured_before_the_rate_falls():
    steps, losses = smoothed([[10, 4.0], [20, 3.0], [30, 2.0], [40, 1.5], [50, 0.1]], 40)
    np.testing.assert_allclose(steps, [20, 30])
    np.testing.assert_allclose(losses, [3, 6.5 / 3])
