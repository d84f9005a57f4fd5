from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.kv.attention_matching import matching as m


def logits(seed=0, heads=2, queries=40, keys=30):
    return torch.randn(heads, queries, keys, generator=torch.Generator().manual_seed(seed)) * 2


def test_mass_features_and_attention_against_numpy():
    s = logits()
    features, mass = m.mass_features(s)
    wanted = np.exp(s.double().numpy())
    np.testing.assert_allclose((features / mass[..., None]).numpy(), wanted / wanted.sum(-1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(m.attention(s).numpy(), wanted / wanted.sum(-1, keepdims=True), rtol=1e-4)


def test_huge_logits_and_empty_rows_stay_finite():
    s = logits() * 1000
    s[0, 0] = -torch.inf
    features, mass = m.mass_features(s)
    assert features.isfinite().all() and mass[0, 0] == 0
    assert m.attention(s)[0, 0].abs().sum() == 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 12))
def test_exact_mass_fit_is_scipys_nnls(seed, size):
    features, mass = m.mass_features(logits(seed))
    kept = features[..., :size]
    fitted = m.fit_mass(kept, mass, 0.0, float("inf"), exact=True)
    for head in range(2):
        wanted, _ = scipy.optimize.nnls(kept[head].double().numpy(), mass[head].double().numpy())
        np.testing.assert_allclose(fitted[head].numpy(), wanted, atol=1e-6 * max(1.0, wanted.max()))


@pytest.mark.parametrize("low,high", [(np.exp(-3), np.exp(3)), (0.9, 1.2)])  # inside the bounds, and at them
def test_published_mass_fit_step_by_step(low, high):
    """Least squares, clamp, two projected gradient steps of 1/‖M‖², written out in NumPy."""
    features, mass = m.mass_features(logits(1))
    kept = features[..., :5]
    got = m.fit_mass(kept, mass, low, high, steps=2)
    for head in range(2):
        matrix, aim = kept[head].double().numpy(), mass[head].double().numpy()
        w = np.clip(np.linalg.lstsq(matrix, aim, rcond=None)[0], low, high)
        vector = np.ones(5)
        for _ in range(3):
            vector = matrix.T @ (matrix @ vector)
            vector /= np.linalg.norm(vector)
        norm = vector @ (matrix.T @ (matrix @ vector))
        for _ in range(2):
            w = np.clip(w - matrix.T @ (matrix @ w - aim) / norm, low, high)
        np.testing.assert_allclose(got[head].numpy(), w, rtol=1e-6)


def test_all_keys_get_weight_one():
    features, mass = m.mass_features(logits(2, queries=200))
    np.testing.assert_allclose(m.fit_mass(features, mass, np.exp(-3), np.exp(3)).numpy(), 1.0, atol=1e-5)


def test_values_fit_is_least_squares_and_ridge_is_augmented_least_squares():
    weights = m.attention(logits(3)[..., :6])
    outputs = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(1))
    # A ridge lets the Gram matrix be solved in the precision that is given; without one it is always float64.
    for ridge, dtype, tolerance in ((0.0, torch.float32, 1e-7), (0.1, torch.float64, 1e-7), (0.1, torch.float32, 2e-6)):
        got = m.fit_values(weights.to(dtype), outputs.to(dtype), ridge)
        for head in range(2):
            x, y = weights[head].double().numpy(), outputs[head].double().numpy()
            extra = np.sqrt(ridge * (x**2).sum() / 6) * np.eye(6)
            wanted = np.linalg.lstsq(np.vstack([x, extra]), np.vstack([y, np.zeros((6, 4))]), rcond=None)[0]
            np.testing.assert_allclose(got[head].numpy(), wanted, atol=tolerance)


def test_a_strong_ridge_gives_back_the_prior():
    weights, prior = m.attention(logits(3)[..., :6]), torch.randn(2, 6, 4)
    got = m.fit_values(weights, torch.randn(2, 40, 4), ridge=1e9, prior=prior)
    torch.testing.assert_close(got, prior, atol=1e-6, rtol=0)


@pytest.mark.parametrize("queries,keys", [(3, 10), (40, 10)])
def test_rank_deficient_fits_stay_small(queries, keys):
    """Fewer queries than keys, and every key twice: the minimum-norm solution, no explosion."""
    s = logits(4, queries=queries, keys=keys).repeat(1, 1, 2)
    weights = m.attention(s)
    outputs = torch.randn(2, queries, 4, generator=torch.Generator().manual_seed(1))
    got = m.fit_values(weights, outputs)
    for head in range(2):
        wanted = np.linalg.lstsq(weights[head].double().numpy(), outputs[head].double().numpy(), rcond=1e-6)[0]
        np.testing.assert_allclose(got[head].numpy(), wanted, atol=1e-3 * np.abs(wanted).max())


def naive_pursuit(features, mass, count, upper):
    chosen, residual = [], mass.copy()
    while len(chosen) < count:
        score = features.T @ residual
        score[chosen] = -np.inf
        chosen.append(int(score.argmax()))
        part = features[:, chosen]
        w = np.clip(np.linalg.lstsq(part, mass, rcond=None)[0], 1e-12, upper)
        residual = mass - part @ w
    return chosen


def test_pursuit_follows_algorithm_1():
    features, mass = m.mass_features(logits(5))
    got = m.orthogonal_matching_pursuit(features, mass, 8, np.exp(7))
    for head in range(2):
        wanted = naive_pursuit(features[head].double().numpy(), mass[head].double().numpy(), 8, np.exp(7))
        assert got[head].tolist() == wanted


@pytest.mark.parametrize("step,period", [(1, 1), (4, 2), (None, 1)])
def test_pursuit_chooses_distinct_keys_and_the_forced_ones_first(step, period):
    features, mass = m.mass_features(logits(6))
    forced = torch.zeros(2, 30, dtype=torch.bool)
    forced[:, [3, 17]] = True
    got = m.orthogonal_matching_pursuit(features, mass, 11, np.exp(7), 1e-12, step, period, forced)
    for row in got.tolist():
        assert len(set(row)) == 11 and set(row[:2]) == {3, 17}


def test_refinement_replaces_keys_of_no_weight():
    """Key 1 is key 0 again, so one of the two has no weight; the third key, needed for the mass, takes its place."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 40, 6, generator=generator) + 0.1
    features = torch.cat([base[..., :1] * 5, base[..., :1] * 5, base[..., 1:]], -1)
    mass = features.sum(-1)
    forced = torch.zeros(1, 7, dtype=torch.bool)
    plain = m.refined_pursuit(features, mass, 5, 1e3, 1e-12, 1, 1, forced, rounds=0)[0]
    refined = m.refined_pursuit(features, mass, 5, 1e3, 1e-12, 1, 1, forced, rounds=3)[0]
    assert len(plain) == 5 and len(refined) == 5 and len(set(refined.tolist())) == 5
    weights = m.fit_mass(features[:, :, refined], mass, 1e-12, 1e3, steps=0)
    assert float(weights.min()) >= np.exp(-7)
    every = torch.ones(1, 7, dtype=torch.bool)
    assert len(m.refined_pursuit(features, mass, 7, 1e3, 1e-12, 1, 1, every, rounds=3)[0]) == 7


def test_without_evidence_an_entry_stands_for_itself():
    """A key that no query attends to has no column: the ridge leaves its weight at 1, and exact and published agree."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(1, 30, 4, generator=generator)
    features[..., 3] = 0.0
    mass = features @ torch.tensor([2.0, 1.0, 0.5, 9.0])
    for exact in (False, True):
        weights = m.fit_mass(features, mass, 1e-3, 20.0, exact=exact, ridge=1e-4)[0]
        np.testing.assert_allclose(weights.numpy(), [2.0, 1.0, 0.5, 1.0], atol=0.05)
