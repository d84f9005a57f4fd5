"""What a model makes of a compacted cache, against explicit float64 attention over its keys, values and biases."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Cohere2Config,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    StableLmConfig,
)

from lissom import AttentionMatching, KVBudget, compact
from lissom.kv.cache import CompactLayer
from lissom.kv.storage import Block, RaggedStore

TOKENS = 90
_SHAPE = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
OTHERS = {
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "olmo2": lambda: Olmo2Config(**_SHAPE),
    "phi3": lambda: Phi3Config(**_SHAPE),
    "stablelm": lambda: StableLmConfig(**_SHAPE),  # partial rotary
    "cohere2": lambda: Cohere2Config(**{**_SHAPE, "num_hidden_layers": 4}, sliding_window=8),
}


def build(name):
    if name not in OTHERS:
        return tiny_model(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(OTHERS[name]()).eval()


def explicit_logits(model, cache, question):
    """Logits of `question` behind `cache`, one head after the other in float64; full-attention layers only."""

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, **unused):
        store = cache.layers[module.layer_idx].store
        _, heads, tokens, size = query.shape
        scale = size**-0.5 if scaling is None else scaling
        output = torch.empty_like(query)
        for head in range(heads):
            kv = head // (heads // key.shape[1])
            block, new = store.block(kv), torch.ones(tokens, tokens).triu(1).bool()
            q, k, v = (x.double() for x in (query[0, head], key[0, kv], value[0, kv]))
            old = q @ block.keys.double().T * scale + (0 if block.bias is None else block.bias.double())
            logits = torch.cat([old, (q @ k.T * scale).masked_fill(new, -math.inf)], 1)
            output[0, head] = (logits.softmax(-1) @ torch.cat([block.values.double(), v])).float()
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register("explicit_for_tests", attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = "explicit_for_tests"
    try:
        positions = torch.arange(cache.get_seq_length(), cache.get_seq_length() + question.shape[1])[None]
        return model(question, position_ids=positions, use_cache=False).logits
    finally:
        model.config._attn_implementation = before


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "olmo2", "phi3", "stablelm"])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("budgets", ["uniform", "global"])
def test_biases_count_in_short_and_long_questions(name, tokens, budgets):
    model, question = build(name), random_ids(tokens, seed=2)
    cache = compact(model, random_ids(TOKENS), ratio=0.2, budgets=budgets)
    assert any(layer.store.bias is not None for _, layer in cache.compact_layers())
    wanted = explicit_logits(model, cache, question)
    torch.testing.assert_close(model(question, past_key_values=cache).logits, wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("padding", [0, 7])
def test_a_question_of_more_than_one_chunk_of_queries(padding):
    model, document, question = build("mistral"), random_ids(TOKENS), random_ids(600, seed=2)
    wanted = explicit_logits(model, compact(model, document, ratio=0.2, queries="context"), question)
    mask = torch.ones(1, padding + TOKENS + 600, dtype=torch.long)
    mask[:, :padding] = 0
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), document], 1)
    inputs = {"input_ids": ids, "attention_mask": mask[:, : padding + TOKENS]}
    cache = compact(model, inputs, ratio=0.2, queries="context")
    got = model(
        question,
        past_key_values=cache,
        attention_mask=mask if padding else None,
        position_ids=torch.arange(TOKENS, TOKENS + 600)[None],
    ).logits
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)


def test_padding_between_document_and_a_long_question():
    model, document, question = build("mistral"), random_ids(TOKENS), random_ids(600, seed=2)
    cache = compact(model, document, ratio=0.2, queries="context")
    wanted = explicit_logits(model, cache, question)
    mask = torch.ones(1, TOKENS + 611, dtype=torch.long)
    mask[:, TOKENS : TOKENS + 11] = 0
    gap = torch.zeros(1, 11, dtype=torch.long)
    got = model(
        torch.cat([gap, question], 1),
        past_key_values=cache,
        attention_mask=mask,
        position_ids=torch.cat([gap, torch.arange(TOKENS, TOKENS + 600)[None]], 1),
    ).logits[:, 11:]
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere2"])
@pytest.mark.parametrize("queries", ["context", "repeat"])
def test_a_padded_row_is_compacted_as_it_is_alone(name, queries):
    model, alone = build(name), random_ids(31, seed=4)
    ids = random_ids(50, rows=2, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :19], ids[1, 19:] = 0, alone[0]
    method = AttentionMatching(ratio=0.3, queries=queries)
    batch = compact(model, {"input_ids": ids, "attention_mask": mask}, method)
    single = compact(model, alone, method)
    for (_, ours), (_, theirs) in zip(batch.compact_layers(), single.compact_layers(), strict=True):
        heads = theirs.store.heads
        for head in range(heads):
            got, wanted = ours.store.block(heads + head), theirs.store.block(head)
            assert (got.positions - 19).tolist() == wanted.positions.tolist()
            torch.testing.assert_close(got.values, wanted.values, atol=1e-2, rtol=1e-2)


def test_a_short_row_beside_a_long_one():
    model, ids = tiny_model("llama"), random_ids(400, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :380] = 0
    cache = compact(model, {"input_ids": ids, "attention_mask": mask}, ratio=0.2)
    assert model(random_ids(7, rows=2), past_key_values=cache).logits.isfinite().all()


def test_biases_stay_exact_in_a_16_bit_model():
    count = 64
    zeros, values = torch.zeros(count, 8, dtype=torch.bfloat16), torch.zeros(count, 8, dtype=torch.bfloat16)
    values[:32] = 1.0
    bias = torch.full((count,), 5.0)
    bias[:32] += 0.012  # bfloat16 has 5.0 and 5.03
    layer = CompactLayer()
    layer.store = RaggedStore([Block(zeros, values, torch.arange(count, dtype=torch.int32), bias)], 1)
    layer.logical = count
    layer.update(*(torch.full((1, 1, 20, 8), -1e4, dtype=torch.bfloat16) for _ in range(2)))
    share = float(torch.sigmoid(torch.tensor(0.012)))
    out = layer.attend(torch.ones(1, 1, 20, 8, dtype=torch.bfloat16), None, 1.0, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, torch.full_like(out, share), atol=1e-3, rtol=0)
    assert abs(share - 0.5) > 2.5e-3


def test_rows_take_their_biases_along():
    blocks = [
        Block(
            torch.full((size, 4), float(i)),
            torch.full((size, 4), float(i)),
            torch.full((size,), i, dtype=torch.int32),
            torch.full((size,), float(i)),
        )
        for i, size in enumerate((3, 5, 3, 5, 3, 5))
    ]
    store = RaggedStore(blocks, 3)
    store.select_rows(torch.tensor([2, 0, 0, 1]))
    for index, wanted in enumerate((4, 5, 0, 1, 0, 1, 2, 3)):
        block = store.block(index)
        assert (block.bias == wanted).all() and (block.keys == wanted).all()
        assert len(block.keys) == (3, 5)[wanted % 2]


def test_the_budget_s_reference_are_the_latest_queries_and_little_memory():
    model, ids = build("mistral"), random_ids(200)
    small, large = KVBudget(60_000, window=32).cache(model), KVBudget("64MB", window=512).cache(model)
    for cache in (small, large):
        model(ids, past_key_values=cache)
    layer = small.layers[0]
    assert layer.places.tolist() == list(range(168, 200))
    torch.testing.assert_close(layer.recent, large.layers[0].recent[:, :, -32:])
    assert layer.recent.untyped_storage().nbytes() == layer.recent.nbytes  # no view of the whole prompt's
    layer = large.layers[0]
    layer.crop(-5)
    assert layer.places.tolist() == list(range(195)) and layer.recent.shape[2] == 195
    streaming = KVBudget(60_000, "streaming-llm").cache(model)
    model(ids, past_key_values=streaming)
    assert streaming.layers[0].recent is None
