from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_model

from lissom import AttentionMatching, Eviction, compact
from lissom.errors import UserError
from lissom.kv import influence
from lissom.kv.compact import Reading, recompact
from lissom.kv.head_budgets import apportion, global_counts, solve_shares


@settings(max_examples=200, deadline=None)
@given(
    shares=st.lists(st.floats(0, 10), min_size=1, max_size=12),
    least=st.integers(1, 5),
    width=st.integers(0, 60),
    data=st.data(),
)
def test_integers_add_up_and_keep_their_bounds(shares, least, width, data):
    most = least + width
    total = data.draw(st.integers(len(shares) * least, len(shares) * most))
    counts = apportion(torch.tensor(shares), total, least, most)
    assert int(counts.sum()) == total and int(counts.min()) >= least and int(counts.max()) <= most
    for a, b in itertools.combinations(range(len(shares)), 2):
        if shares[a] > shares[b]:
            assert counts[a] >= counts[b] - 1


def test_without_bounds_it_is_proportional():
    assert apportion(torch.tensor([1.0, 2.0, 5.0]), 80, 1, 79).tolist() == [10, 20, 50]
    with pytest.raises(ValueError, match="cannot be shared out"):
        apportion(torch.ones(3), 2, 1, 5)


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 5), entries=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_global_choice_is_the_best_of_all(heads, entries, seed, data):
    least = data.draw(st.integers(1, entries))
    total = data.draw(st.integers(heads * least, heads * entries))
    scores = torch.rand(heads, entries, generator=torch.Generator().manual_seed(seed))
    counts = global_counts(scores, total, least)
    assert int(counts.sum()) == total and int(counts.min()) >= least
    best = max(
        (c for c in itertools.product(range(least, entries + 1), repeat=heads) if sum(c) == total),
        key=lambda c: sum(float(scores[h].sort(descending=True).values[:n].sum()) for h, n in enumerate(c)),
    ) if entries**heads < 5000 else None  # fmt: skip
    assert best is None or counts.tolist() == list(best)


def test_shares_go_where_they_help_and_a_u_shape_does_not_trap_them():
    ratios = (0.0, 0.05, 0.1, 0.2, 0.4)
    flat, needy = [0.0] * 5, [1.0, 0.5, 0.2, 0.05, 0.0]
    hump = [0.0, 0.4, 0.1, 0.0, 0.0]  # a little is worse than nothing
    shares = solve_shares(ratios, np.array([flat, flat, needy, hump]), targets=(0.05, 0.1), step=0.005)
    assert shares.sum() == pytest.approx(1) and shares.min() >= 0
    assert shares[2] == shares.max() and shares[:2].max() < 0.2


def test_the_solver_is_near_the_best_split_of_two_convex_heads():
    ratios = np.linspace(0, 1, 21)
    curves = np.array([np.exp(-4 * ratios), 2 * np.exp(-8 * ratios)])
    shares = solve_shares(ratios, curves, targets=(0.25,), step=0.01)

    def loss(first):
        return sum(np.interp(0.5 * s, ratios, c) for s, c in zip((first, 1 - first), curves, strict=True))

    assert loss(shares[0]) <= min(loss(x) for x in np.linspace(0, 1, 101)) + 0.01


@pytest.mark.parametrize("budgets", ["global", "measured"])
def test_the_same_total_is_stored_whatever_the_budgets(budgets):
    model, ids = tiny_model("llama"), random_ids(120)
    uniform = compact(model, ids, Eviction(ratio=0.2, score="kvzip"))
    shares = tuple(tuple(row) for row in torch.rand(3, 2, generator=torch.Generator().manual_seed(1)).tolist())
    method = Eviction(ratio=0.2, score="kvzip", budgets=budgets, shares=shares if budgets == "measured" else ())
    ragged = compact(model, ids, method)
    assert ragged.stored_entries == uniform.stored_entries
    lengths = torch.cat([layer.store.lengths for _, layer in ragged.compact_layers()])
    assert len(set(lengths.tolist())) > 1 and int(lengths.min()) >= 5
    assert ragged.stored_bytes == uniform.stored_bytes
    assert model(random_ids(7, seed=4), past_key_values=ragged).logits.isfinite().all()


@pytest.mark.parametrize("budgets", ["global", "measured"])
@pytest.mark.parametrize("kind", [Eviction, AttentionMatching])
def test_each_row_of_a_batch_is_shared_out_as_it_is_alone(budgets, kind):
    model, ids, padding = tiny_model("qwen3"), random_ids(100, rows=2), 30
    shares = tuple(tuple(row) for row in torch.rand(3, 2, generator=torch.Generator().manual_seed(1)).tolist())
    options = {"score": "kvzip"} if kind is Eviction else {"queries": "repeat"}
    method = kind(ratio=0.2, budgets=budgets, shares=shares if budgets == "measured" else (), **options)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    both = compact(model, {"input_ids": ids, "attention_mask": mask}, method)
    alone = [compact(model, ids[:1, padding:], method), compact(model, ids[1:], method)]
    for index, layer in both.compact_layers():
        for row, other in enumerate(alone):
            store = other.layers[index].store
            assert layer.store.lengths[row * 2 : row * 2 + 2].equal(store.lengths)
            for head in range(2):
                ours, theirs = layer.store.block(row * 2 + head), store.block(head)
                torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-3)
                torch.testing.assert_close(ours.values, theirs.values, atol=1e-2, rtol=1e-2)


def test_a_ragged_cache_is_shared_out_again():
    model, ids = tiny_model("llama"), random_ids(120)
    first = compact(model, ids, Eviction(ratio=0.5, score="kvzip", budgets="global"))
    second = recompact(model, first, ids, AttentionMatching(ratio=0.5, budgets="global"))
    assert second.stored_entries == 30 * 6
    assert model(random_ids(7, seed=4), past_key_values=second).logits.isfinite().all()


def test_measured_budgets_at_a_large_ratio():
    model, ids = tiny_model("llama"), random_ids(100)
    shares = ((0.9, 0.02), (0.02, 0.02), (0.02, 0.02))
    cache = compact(model, ids, AttentionMatching(ratio=0.9, budgets="measured", shares=shares))
    assert cache.stored_entries == 90 * 6


def test_budgets_that_cannot_be():
    model, ids = tiny_model("llama"), random_ids(60)
    with pytest.raises(UserError, match="go together"):
        AttentionMatching(budgets="measured")
    with pytest.raises(UserError, match="6 that are"):
        compact(model, ids, AttentionMatching(budgets="measured", shares=((0.5, 0.5),)))


def lessons(model):
    document, answered = random_ids(90), [random_ids(8, seed=s) for s in (1, 2)]
    return [influence.Lesson(document, answered, [3, 4])]


def test_influence_is_measured_kept_and_taken_up_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    model = tiny_model("qwen3")
    with pytest.raises(UserError, match="lissom budgets"):
        influence.load_shares(model)

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        influence.measure_shares(model, None, lessons(model), (0.05, 0.2), stop)
    seen = []
    shares = influence.measure_shares(model, None, lessons(model), (0.05, 0.2), lambda done, total: seen.append(done))
    assert seen == [3, 4, 5, 6]  # the first layer's two heads were kept
    assert shares.shape == (3, 2) and shares.sum() == pytest.approx(1)
    curves = np.array(json.loads(influence.path_of(model).read_text())["curves"])
    assert influence.BASELINE == 0.05 and np.abs(curves[..., 0]).max() < 1e-6  # nothing is changed there
    assert np.abs(curves[..., 1]).min() > 0
    loaded = influence.load_shares(model)
    np.testing.assert_allclose(loaded, shares)
    cache = compact(model, random_ids(100), AttentionMatching(ratio=0.2, budgets="measured", shares=loaded))
    assert cache.stored_entries == 20 * 6
    influence.path_of(model).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        influence.load_shares(model)


def test_one_reading_serves_several_methods():
    model, ids = tiny_model("llama"), random_ids(100)
    reading = Reading.of(model, ids, AttentionMatching())
    full = reading.cache.stored_bytes
    for ratio in (0.5, 0.1):
        shared = reading.compact(AttentionMatching(ratio=ratio))
        alone = compact(model, ids, ratio=ratio)
        question = random_ids(5, seed=9)
        torch.testing.assert_close(
            model(question, past_key_values=shared).logits, model(question, past_key_values=alone).logits
        )
    assert reading.cache.stored_bytes == full
    with pytest.raises(UserError, match="cannot be shared"):
        Reading.of(model, ids, AttentionMatching(on_policy=True))
    with pytest.raises(UserError, match="read it for this method"):
        reading.compact(Eviction(score="h2o"))
