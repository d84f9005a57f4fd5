from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARCHITECTURES, random_ids, tiny_model
from transformers import DynamicCache

from lissom import AttentionMatching, Eviction, KVBudget
from lissom.errors import UserError
from lissom.kv.budget import BudgetLayer
from lissom.kv.cache import CompactCache
from lissom.models import describe_decoder
from lissom.models.byte_sizes import parse_bytes


def size_of(model, tokens: int, rows: int = 1) -> int:
    """Bytes of `tokens` entries of every full-attention layer, bias and position included."""
    info = describe_decoder(model)
    layers = info.sliding.count(False)
    return layers * rows * info.num_key_value_heads * tokens * (8 * info.head_dim + 8)


def read(model, ids, cache, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits


@pytest.mark.parametrize(
    "text,expected", [("64MB", 64_000_000), (1024, 1024), ("1.5 GiB", 3 * 2**29), ("8k", 8000), ("7 b", 7)]
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "8 parsecs", 0])
def test_no_size(text):
    with pytest.raises(UserError, match="no size"):
        KVBudget(text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["attention-matching", "streaming-llm", "h2o"])
def test_what_is_stored_stays_within_the_budget(architecture, method):
    model = tiny_model(architecture)
    size = size_of(model, 60)
    cache = KVBudget(size, method, protect=8).cache(model)
    ids = random_ids(300)
    for start, end in ((0, 100), (100, 101), (101, 160), (160, 161), (161, 300)):
        logits = read(model, ids[:, start:end], cache)
        assert cache.stored_bytes <= size and logits.isfinite().all()
        assert sum(layer.nbytes for _, layer in cache.compact_layers()) <= size
    assert cache.get_seq_length() == 300
    assert any(layer.store.stored_entries for _, layer in cache.compact_layers())


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(30, 90),
    protect=st.integers(1, 10),
    target=st.floats(0.5, 0.9),
    turns=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    rows=st.integers(1, 2),
)
def test_the_guarantee_holds_for_any_turns(tokens, protect, target, turns, rows):
    model = tiny_model("llama")
    size = size_of(model, tokens, rows)
    cache = KVBudget(size, protect=protect, target=target).cache(model)
    for number, turn in enumerate(turns):
        read(model, random_ids(turn, rows, seed=number), cache)
        assert cache.stored_bytes <= size
    assert cache.get_seq_length() == sum(turns)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_budget_that_is_never_reached_changes_nothing(architecture):
    model = tiny_model(architecture)
    ids = random_ids(40)
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    with KVBudget("1MB")(model):
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)
    cache = KVBudget("1MB").cache(model)
    pieces = torch.cat([read(model, part, cache) for part in ids.split([25, 14, 1], dim=1)], 1)
    torch.testing.assert_close(pieces, model(ids).logits, atol=2e-4, rtol=1e-4)


def test_streaming_llm_is_attention_to_sinks_and_the_last_tokens():
    model = tiny_model("llama")
    ids = random_ids(80)
    cache = KVBudget(size_of(model, 24), "streaming-llm", protect=5).cache(model)
    seen = torch.zeros(80, 80, dtype=torch.bool)
    steps = []
    for i in range(80):
        if i:
            seen[i, cache.compact_layers()[0][1].store.block(0).positions.long()] = True
        seen[i, i] = True
        steps.append(read(model, ids[:, i : i + 1], cache))
    assert seen[-1].sum() <= 25 and seen[-1, :4].all() and not seen[-1, 4:50].any()
    mask = torch.zeros(80, 80).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=torch.arange(80)[None]).logits
    torch.testing.assert_close(torch.cat(steps, 1), wanted, atol=2e-4, rtol=1e-4)


def test_a_later_compaction_sees_the_biases_of_the_earlier_one():
    model = tiny_model("llama")
    ids = random_ids(200)
    cache = KVBudget(size_of(model, 48), "attention-matching", protect=4).cache(model)
    read(model, ids[:, :60], cache)
    layer = cache.compact_layers()[0][1]
    first = layer.store.block(0)
    assert first.bias is not None and first.bias[:-4].abs().max() > 0.01
    entries = len(first.keys)
    read(model, ids[:, 60:120], cache)
    block = layer.store.block(0)
    assert len(block.keys) == entries and int(block.positions[-1]) == 119
    # Mass does not fade with each round: what is kept still stands for about all that was read.
    assert 30 < float(block.bias.exp().sum()) < 1000


def test_a_padded_row_reads_as_it_does_alone():
    model = tiny_model("llama")
    ids, padding = random_ids(90), torch.zeros(1, 20, dtype=torch.int64)
    both = torch.cat([random_ids(110, seed=3), torch.cat([padding, ids], 1)])
    mask = torch.ones_like(both)
    mask[1, :20] = 0
    batched = KVBudget(size_of(model, 48, rows=2), "streaming-llm", protect=6).cache(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(both, attention_mask=mask, position_ids=positions, past_key_values=batched)
        after = model(
            random_ids(1, 2, seed=5), attention_mask=torch.cat([mask, mask[:, :1] | 1], 1),
            position_ids=torch.tensor([[110], [90]]), past_key_values=batched,
        ).logits  # fmt: skip
    alone = KVBudget(size_of(model, 48), "streaming-llm", protect=6).cache(model)
    read(model, ids, alone)
    wanted = read(model, random_ids(1, 2, seed=5)[1:], alone)
    torch.testing.assert_close(after[1:], wanted, atol=3e-4, rtol=1e-3)


def test_generation_far_beyond_the_budget_and_beams():
    model = tiny_model("llama")
    with KVBudget(size_of(model, 40), protect=6)(model):
        out = model.generate(random_ids(90), max_new_tokens=80, do_sample=False)
        assert out.shape == (1, 170)
    with KVBudget(size_of(model, 40, rows=3), protect=6)(model):
        beams = model.generate(random_ids(60), max_new_tokens=40, num_beams=3, do_sample=False)
        assert beams.shape == (1, 100)
    assert not model._forward_pre_hooks and model.config._attn_implementation == "sdpa"


def test_turns_of_generate_share_one_cache():
    model = tiny_model("qwen3")
    size = size_of(model, 64)
    cache = KVBudget(size, protect=8).cache(model)
    ids = random_ids(50)
    for turn in range(4):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        ids = torch.cat([ids, random_ids(15, seed=turn)], 1)
        assert cache.stored_bytes <= size
    assert cache.get_seq_length() == ids.shape[1] - 16


def test_a_cache_without_layers_has_them_from_the_first_pass_on():
    model = tiny_model("gemma3")
    ids, cache = random_ids(100), DynamicCache()
    size = size_of(model, 60)
    with AttentionMatching(ratio=0.5, queries="context")(model), KVBudget(size)(model):
        read(model, ids, cache)
    assert sum(layer.stored_bytes for layer in cache.layers if isinstance(layer, BudgetLayer)) <= size
    assert [isinstance(layer, BudgetLayer) for layer in cache.layers] == [
        not s for s in describe_decoder(model).sliding
    ]


def test_it_composes_with_compaction_of_the_prompt():
    model = tiny_model("llama")
    seen = []
    with AttentionMatching(ratio=0.5, queries="context")(model), KVBudget(size_of(model, 60))(model):
        cache = DynamicCache(config=model.config)
        read(model, random_ids(80), cache)
        seen = [layer.store.stored_entries for layer in cache.layers]
        assert all(isinstance(layer, BudgetLayer) for layer in cache.layers)
    assert max(seen) <= 2 * 60


@pytest.mark.parametrize("budget_first", [False, True])
def test_a_repeat_pass_longer_than_the_budget_is_forgotten_again(budget_first):
    model = tiny_model("llama")
    methods = [AttentionMatching(ratio=0.5), KVBudget(size_of(model, 60))]
    with ExitStack() as stack:
        for method in methods[::-1] if budget_first else methods:
            stack.enter_context(method(model))
        cache = DynamicCache(config=model.config)
        read(model, random_ids(200), cache)
        assert all(layer.get_seq_length() == 200 and layer.store.stored_entries <= 2 * 60 for layer in cache.layers)
        read(model, random_ids(40, seed=1), cache)
        assert all(layer.store.stored_entries <= 2 * 60 for layer in cache.layers)


def test_a_copy_goes_its_own_way():
    model = tiny_model("llama")
    cache = KVBudget(size_of(model, 48), Eviction(score="h2o"), protect=6).cache(model)
    read(model, random_ids(100), cache)
    copy = cache.copy()
    one = read(model, random_ids(60, seed=1), copy)
    assert cache.get_seq_length() == 100
    torch.testing.assert_close(read(model, random_ids(60, seed=1), cache), one)


def test_mistakes():
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"too small.*need"), KVBudget(size_of(model, 20))(model):
        model.generate(random_ids(60), max_new_tokens=2)
    with pytest.raises(UserError, match=r"too small.*need"), KVBudget(2)(model):
        model.generate(random_ids(60), max_new_tokens=2)
    for wrong in ("best", {"eviction": {"score": "best"}}, {"best": {}}, {"eviction": {"colour": 1}}):
        with pytest.raises(UserError, match=r"expected one of|unexpected keyword"):
            KVBudget("1MB", wrong)
    with pytest.raises(UserError, match="target"):
        KVBudget("1MB", target=1.0)
    assert isinstance(KVBudget("1MB").cache(model), CompactCache)
