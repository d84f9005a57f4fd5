from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_ids, tiny_model
from transformers import DynamicCache

from lissom.evals.needle import needles
from lissom.evals.perplexity import nll_behind, window_nll

MODEL = tiny_model("llama")


def one_by_one(ids, window, stride):
    """Every token's NLL from its own forward pass, with the context that its window gives it."""
    losses = []
    for i in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), stride) if i < s + window)
        logits = MODEL(ids[None, start:i]).logits[0, -1]
        losses.append(float(-logits.double().log_softmax(-1)[ids[i]]))
    return torch.tensor(losses)


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(2, 40), window=st.integers(2, 16), data=st.data())
@torch.no_grad()
def test_strided_windows_score_every_token_once(tokens, window, data):
    stride = data.draw(st.integers(1, window - 1))
    ids = random_ids(tokens)[0]
    torch.testing.assert_close(
        window_nll(MODEL, ids, window, stride), one_by_one(ids, window, stride), atol=1e-4, rtol=1e-4
    )


def test_windows_that_make_no_sense():
    with pytest.raises(ValueError, match="stride"):
        window_nll(MODEL, random_ids(10)[0], window=4, stride=4)
    with pytest.raises(ValueError, match="two token ids"):
        window_nll(MODEL, random_ids(1)[0])


@torch.no_grad()
def test_text_behind_a_cache():
    ids = random_ids(50)
    cache = DynamicCache(config=MODEL.config)
    MODEL(ids[:, :30], past_key_values=cache)
    wanted = window_nll(MODEL, ids[0], window=50, stride=49)[30:]
    torch.testing.assert_close(nll_behind(MODEL, cache, ids[:, 30:]), wanted, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 30


def test_needles_lie_where_they_are_said_to(smollm2):
    _, tokenizer = smollm2
    found = list(needles(tokenizer, [300, 600], [0.1, 0.9]))
    assert [(n.length, n.depth) for n in found] == [(300, 0.1), (300, 0.9), (600, 0.1), (600, 0.9)]
    for needle in found:
        text = tokenizer.decode(needle.ids[0])
        assert abs(text.index(needle.code) / len(text) - needle.depth) < 0.25
        assert needle.ids.shape[1] == pytest.approx(needle.length, abs=60)
