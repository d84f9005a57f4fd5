from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from lissom.evals.stats import geometric_interval, paired_bootstrap


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(1).normal(1.0, 2.0, 60)
    got = paired_bootstrap(values, samples=20000)
    wanted = scipy.stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", rng=2)
    assert got.estimate == pytest.approx(values.mean())
    assert got.low == pytest.approx(wanted.confidence_interval.low, abs=0.05)
    assert got.high == pytest.approx(wanted.confidence_interval.high, abs=0.05)


def test_pairing_removes_what_both_share():
    common = np.random.default_rng(1).normal(0.0, 100.0, 50)
    got = paired_bootstrap(common + 1.0, common)
    assert got.low == pytest.approx(1.0) and got.high == pytest.approx(1.0)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="one number per unit"):
        paired_bootstrap(np.zeros((2, 2)))


def test_geometric_means_are_of_ratios():
    values = np.array([1.2, 1.5, 0.9, 1.1])
    got = geometric_interval(values)
    assert got.estimate == pytest.approx(scipy.stats.gmean(values))
    logs = np.log(values)
    wanted = np.exp(scipy.stats.t.interval(0.95, 3, logs.mean(), scipy.stats.sem(logs)))
    assert (got.low, got.high) == pytest.approx(tuple(wanted))
    turned = geometric_interval(1 / values)
    assert (turned.low, turned.high) == pytest.approx((1 / got.high, 1 / got.low))
