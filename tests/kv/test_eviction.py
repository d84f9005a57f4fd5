"""The scores of the eviction baselines against loops over single numbers, and whole fits against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lissom import AttentionMatching
from lissom.kv.compactor import Problem
from lissom.kv.eviction import SCORES, Eviction

HEADS, GROUP, TOKENS, SIZE = 2, 3, 90, 8


def problem(absent: int = 0, seed: int = 0) -> Problem:
    """Causal queries of the document itself; the second head has `absent` entries fewer."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(HEADS, TOKENS, SIZE, generator=draw) for _ in range(2))
    queries = torch.randn(HEADS, GROUP * TOKENS, SIZE, generator=draw)
    bias = torch.zeros(HEADS, TOKENS)
    bias[1, TOKENS - absent :] = -torch.inf
    positions = torch.arange(TOKENS).repeat(HEADS, 1)
    query_positions = torch.arange(TOKENS).repeat(GROUP)  # the heads of a group one after the other
    return Problem(keys, values, bias, positions, bias.isneginf() & False, queries, query_positions, 0.4)


def weights(p: Problem) -> np.ndarray:
    """Softmax by hand `[heads, queries, entries]`."""
    out = np.zeros((HEADS, p.queries.shape[1], TOKENS))
    for h in range(HEADS):
        for i, position in enumerate(p.query_positions.tolist()):
            seen = [j for j in range(TOKENS) if j <= position and p.bias[h, j] > -math.inf]
            logits = np.array([float(p.queries[h, i] @ p.keys[h, j]) * 0.4 for j in seen])
            share = np.exp(logits - logits.max())
            out[h, i, seen] = share / share.sum()
    return out


@pytest.mark.parametrize("absent", [0, 7])
def test_h2o_is_the_mean_attention(absent):
    p = problem(absent)
    np.testing.assert_allclose(SCORES["h2o"][0](p), weights(p).mean(1), atol=1e-5)


@pytest.mark.parametrize("absent", [0, 7])
def test_tova_is_the_last_token_s_attention_over_all_heads(absent):
    p = problem(absent)
    last = [i for i, position in enumerate(p.query_positions.tolist()) if position == TOKENS - 1]
    wanted = np.broadcast_to(weights(p)[:, last].mean((0, 1)), (HEADS, TOKENS))
    np.testing.assert_allclose(SCORES["tova"][0](p), wanted, atol=1e-5)


def test_snapkv_pools_the_window_s_attention_and_keeps_the_window():
    p = problem()
    window = [i for i, position in enumerate(p.query_positions.tolist()) if position >= TOKENS - 64]
    mean = weights(p)[:, window].mean(1)
    pooled = np.stack([mean[:, max(0, j - 3) : j + 4].max(1) for j in range(TOKENS)], 1)
    got = SCORES["snapkv"][0](p).numpy()
    np.testing.assert_allclose(got[:, : TOKENS - 64], pooled[:, : TOKENS - 64], atol=1e-5)
    assert got[:, TOKENS - 64 :].min() > got[:, : TOKENS - 64].max()
    # Below the window's size its latest tokens win.
    blocks = Eviction(score="snapkv", sinks=0).fit(p, [5, 5])
    assert all(block.positions.tolist() == list(range(TOKENS - 5, TOKENS)) for block in blocks)


def test_streaming_llm_keeps_sinks_and_the_latest():
    p = problem()
    protected = p.positions < 4
    p = Problem(**{**p.__dict__, "protected": protected})
    (block, _) = Eviction(score="streaming-llm").fit(p, [10, 10])
    assert block.positions.tolist() == [0, 1, 2, 3, *range(TOKENS - 6, TOKENS)]
    assert block.keys.equal(p.keys[0, block.positions]) and block.values.equal(p.values[0, block.positions])


@pytest.mark.parametrize("absent", [0, 7])
def test_kvzip_is_the_largest_attention(absent):
    p = problem(absent)
    np.testing.assert_allclose(SCORES["kvzip"][0](p), weights(p).max(1), atol=1e-5)


def test_kvzip_s_softmax_covers_the_pass_s_own_tokens():
    p = problem()
    own = torch.randn(HEADS, GROUP * TOKENS, generator=torch.Generator().manual_seed(5)) + 3
    p = Problem(**{**p.__dict__, "own_mass": own})
    logits = np.einsum("hqd,hkd->hqk", p.queries.double(), p.keys.double()) * 0.4
    logits[:, p.query_positions[:, None] < torch.arange(TOKENS)] = -np.inf
    share = np.exp(logits) / (np.exp(logits).sum(-1) + np.exp(own.double().numpy()))[..., None]
    np.testing.assert_allclose(SCORES["kvzip"][0](p), share.max(1), atol=1e-5)


def test_expected_attention_is_a_gaussian_s_mean_of_the_exponential():
    """E[e^(q·k·s)] for Gaussian q, by sampling, up to a factor per head; times the length of the value."""
    p = problem()
    got = SCORES["expected-attention"][0](p).double()
    for h in range(HEADS):
        q = p.queries[h].double()
        mean, covariance = q.mean(0), torch.cov(q.T)
        draws = torch.distributions.MultivariateNormal(mean, covariance)
        torch.manual_seed(0)
        sampled = torch.exp(draws.sample((400_000,)) @ p.keys[h].double().T * 0.4).mean(0) * p.values[h].double().norm(
            dim=-1
        )
        ratio = got[h] / sampled
        torch.testing.assert_close(ratio / ratio.mean(), torch.ones(TOKENS, dtype=torch.float64), atol=0.05, rtol=0)


def test_random_is_seeded_and_uniform():
    p = problem()
    assert SCORES["random"][0](p).equal(SCORES["random"][0](p))
    other = Problem(**{**p.__dict__, "seed": 1})
    assert not SCORES["random"][0](p).equal(SCORES["random"][0](other))


def published(p: Problem, head: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, e^β and the best values of the published HAK fit, written out in NumPy."""
    q, k, v = (x[head].double().numpy() for x in (p.queries, p.keys, p.values))
    logits = q @ k.T * p.scaling
    logits[p.query_positions.numpy()[:, None] < np.arange(TOKENS)] = -np.inf
    features = np.exp(logits - logits.max(1, keepdims=True))
    mass = features.sum(1)
    attention = features / mass[:, None]
    kept = np.sort(np.argsort(-np.sqrt((attention**2).mean(0)))[:count])
    design = features[:, kept]
    low, high = math.exp(-3), math.exp(3)
    weights = np.linalg.lstsq(design, mass, rcond=None)[0].clip(low, high)
    for _ in range(2):
        weights = (weights - design.T @ (design @ weights - mass) / np.linalg.norm(design, 2) ** 2).clip(low, high)
    mixed = design * weights
    mixed /= mixed.sum(1, keepdims=True).clip(1e-300)
    return kept, weights, np.linalg.lstsq(mixed, attention @ v, rcond=None)[0]


@pytest.mark.parametrize("count", [1, 7, 30])
def test_the_published_fit_end_to_end(count):
    p = problem()
    method = AttentionMatching(mass_ridge=0.0, ridge=0.0, fit_below=1.0, sinks=0, budgets="uniform")
    fitted = method.fit(p, [count] * HEADS)
    for head, block in enumerate(fitted):
        kept, weights, values = published(p, head, count)
        assert block.positions.tolist() == kept.tolist() and block.keys.equal(p.keys[head, kept])
        np.testing.assert_allclose(block.bias.exp(), weights, rtol=2e-2, atol=1e-2)
        np.testing.assert_allclose(block.values, values, atol=2e-2 * np.abs(values).max())


def test_heads_that_keep_much_keep_it_as_it_is():
    p, counts = problem(), [TOKENS // 2] + [TOKENS // 2 - 1] * (HEADS - 1)
    whole, *others = AttentionMatching(sinks=0).fit(p, counts)
    assert whole.values.equal(p.values[0, whole.positions]) and not whole.bias.any()
    assert all(not block.values.equal(p.values[h, block.positions]) for h, block in enumerate(others, 1))
    fitted = AttentionMatching(sinks=0, fit_below=1.0).fit(p, counts)[0]
    assert fitted.positions.equal(whole.positions) and not fitted.values.equal(whole.values)


def test_pooled_scores_choose_neighbours():
    p = problem()
    for head, block in enumerate(AttentionMatching(sinks=0, pool=5).fit(p, [8] * HEADS)):
        scores = p.statistics("rms").scores[head]
        pooled = torch.stack([scores[max(0, i - 2) : i + 3].max() for i in range(TOKENS)])
        chosen = pooled[block.positions]
        assert len(chosen) == 8 and chosen.sort(descending=True).values.equal(pooled.topk(8).values)


@pytest.mark.parametrize(
    "method", [Eviction(sinks=0, score="kvzip"), AttentionMatching(sinks=0, bias=False)], ids=["eviction", "matching"]
)
def test_old_biases_stay(method):
    bias = torch.randn(HEADS, TOKENS, generator=torch.Generator().manual_seed(5))
    p = Problem(**{**problem().__dict__, "bias": bias})
    for head, block in enumerate(method.fit(p, [15] * HEADS)):
        torch.testing.assert_close(block.bias, bias[head, block.positions])
