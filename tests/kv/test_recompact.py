from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, random_ids, tiny_model

from lissom import AttentionMatching, Eviction, compact
from lissom.errors import UserError
from lissom.kv import recompact

IDS, QUESTION = random_ids(120), random_ids(9, seed=7)


def answer(model, cache):
    with torch.no_grad():
        return model(QUESTION, past_key_values=cache.copy()).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keeping_all_of_what_is_left_changes_nothing(architecture):
    model = tiny_model(architecture)
    once = compact(model, IDS, ratio=0.3)
    again = recompact(model, once, IDS, AttentionMatching(ratio=1.0))
    assert again.stored_entries == once.stored_entries
    torch.testing.assert_close(answer(model, again), answer(model, once), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_second_compaction_is_nearer_than_eviction_after_the_first(architecture):
    """Averaged over seeds of the document; an eviction loses the mass of what it drops, and the biases with it."""
    model = tiny_model(architecture)
    errors = {"matching": 0.0, "eviction": 0.0}
    for seed in range(8):
        ids = random_ids(150, seed=seed)
        once = compact(model, ids, ratio=0.5)
        full = answer(model, compact(model, ids, ratio=1.0))
        for name, method in (
            ("matching", AttentionMatching(ratio=0.3)),
            ("eviction", Eviction(ratio=0.3, score="kvzip")),
        ):
            twice = recompact(model, once, ids, method)
            assert twice.get_seq_length() == 150
            assert twice.stored_entries == pytest.approx(0.3 * once.stored_entries, rel=0.05)
            errors[name] += float((answer(model, twice) - full).norm())
    assert errors["matching"] < errors["eviction"]


def test_what_does_not_fit_together():
    model = tiny_model("llama")
    once = compact(model, IDS, ratio=0.5)
    before = answer(model, once)
    with pytest.raises(UserError, match="has read 120 tokens"):
        recompact(model, once, IDS[:, :50])
    with pytest.raises(UserError, match="another model"):
        recompact(tiny_model("qwen3"), once, IDS)
    with pytest.raises(UserError, match="first reading"):
        recompact(model, once, IDS, Eviction(score="h2o"))
    recompact(model, once, IDS, Eviction(score="streaming-llm", ratio=0.5))
    torch.testing.assert_close(answer(model, once), before)
