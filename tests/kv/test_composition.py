"""Several methods on one model: nested, beside a compaction of one's own, and in several threads."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import permutations

import pytest
import torch
from tiny import random_ids, tiny_model
from transformers import DynamicCache

from lissom import AttentionMatching, Eviction, KVBudget, NativeDecode, compact

IDS = random_ids(100)
METHODS = {
    "repeat": AttentionMatching(ratio=0.5, budgets="uniform"),
    "context": Eviction(ratio=0.5, score="h2o"),
    "none": Eviction(ratio=0.5, score="streaming-llm"),
}


def lengths(cache):
    return [layer.store.lengths.tolist() for layer in cache.layers]


@pytest.mark.parametrize("outer,inner", list(permutations(METHODS, 2)))
def test_nested_methods_both_act(outer, inner):
    model, cache = tiny_model("llama"), DynamicCache()
    with METHODS[outer](model), METHODS[inner](model), torch.no_grad():
        model(IDS, past_key_values=cache)
    assert lengths(cache) == [[25, 25]] * 3


@pytest.mark.parametrize("name", METHODS)
def test_a_compaction_inside_a_block_is_compacted_once(name):
    model, method = tiny_model("llama"), METHODS[name]
    with method(model):
        assert lengths(compact(model, IDS, method)) == [[50, 50]] * 3


def test_a_cache_made_inside_a_block_outlives_it():
    model, question = tiny_model("llama"), torch.cat([IDS, random_ids(7, seed=1)], 1)
    with METHODS["none"](model):
        cache, budgeted = compact(model, IDS, ratio=0.5), KVBudget("1MB").cache(model)
    for each, ids in ((cache, question), (budgeted, IDS)):
        assert model.generate(ids, past_key_values=each, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_a_cache_given_by_place_is_compacted_too():
    model, cache = tiny_model("llama"), DynamicCache()
    with METHODS["context"](model), torch.no_grad():
        model(IDS, None, None, cache)
    assert lengths(cache) == [[50, 50]] * 3


def test_a_block_entered_while_another_thread_is_in_a_pass():
    model = tiny_model("llama")
    inside, entered, failed = threading.Event(), threading.Event(), []

    def wait(*unused):
        inside.set()
        entered.wait(20)

    model.model.layers[0].register_forward_pre_hook(wait)

    def work():
        try:
            with METHODS["none"](model):
                model.generate(IDS, max_new_tokens=1, do_sample=False)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(20)
    with METHODS["none"](model):
        entered.set()
        thread.join()
    assert not failed


def test_a_default_dtype_changes_nothing():
    model = tiny_model("llama")
    wanted = compact(model, IDS, METHODS["repeat"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = compact(model, IDS, METHODS["repeat"])
    finally:
        torch.set_default_dtype(before)
    for (_, ours), (_, theirs) in zip(got.compact_layers(), wanted.compact_layers(), strict=True):
        torch.testing.assert_close(ours.store.values, theirs.store.values)


def test_every_layer_and_head_draws_anew():
    cache = compact(tiny_model("llama"), IDS, Eviction(ratio=0.3, score="random"))
    drawn = {tuple(block.positions.tolist()) for layer in cache.layers for block in layer.store.blocks()}
    assert len(drawn) == 6


@pytest.mark.parametrize(
    "method",
    [AttentionMatching(ratio=0.5, max_queries=2), AttentionMatching(ratio=0.5, queries="context", max_queries=2),
     Eviction(ratio=0.5, score="tova", max_queries=16)],
    ids=str,
)  # fmt: skip
def test_a_padded_row_is_sampled_as_it_would_be_alone(method):
    model, ids = tiny_model("llama"), random_ids(100, rows=2)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    both, alone = (
        compact(model, {"input_ids": ids, "attention_mask": mask}, method),
        compact(model, ids[1:, :20], method),
    )
    for (_, ours), (_, theirs) in zip(both.compact_layers(), alone.compact_layers(), strict=True):
        for head in range(2):
            assert ours.store.block(2 + head).positions.equal(theirs.store.block(head).positions)


@pytest.mark.parametrize("score", ["h2o", "streaming-llm"])
def test_a_budget_knows_padding_natively_too(score):
    """The rows of a padded batch keep the entries that they keep in transformers' own passes, and alone."""
    model, ids = tiny_model("llama"), random_ids(60, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :35] = 0
    budget = KVBudget("100KB", score)
    kept = []
    for native in (NativeDecode(kv="fp32"), None):
        cache = DynamicCache(config=model.config)
        with budget(model), native(model) if native else nullcontext(), torch.no_grad():
            model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, do_sample=False)
        kept.append([[block.positions.tolist() for block in layer.store.blocks()] for layer in cache.layers])
    assert kept[0] == kept[1]
