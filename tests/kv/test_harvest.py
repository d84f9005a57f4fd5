"""The queries that are recorded, and KVzip's scores of them, against transformers' own attention weights."""

from __future__ import annotations

import pytest
import torch
from tiny import random_ids, tiny_model

from lissom.kv import Eviction
from lissom.kv.compact import Reading, problem_of
from lissom.kv.eviction import kvzip_scores
from lissom.kv.harvest import QueryRecorder


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("padding", [0, 5])
def test_kvzip_scores_are_the_largest_weights_of_the_repeat_pass(architecture, padding):
    tokens = 40
    ids = random_ids(tokens, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    model = tiny_model(architecture, "eager")
    both, mask_of_both = (
        torch.cat([ids, ids], 1),
        torch.cat([mask, mask], 1),
    )  # without a tokenizer the text is repeated
    positions = (mask_of_both.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        attentions = model(both, attention_mask=mask_of_both, position_ids=positions, output_attentions=True).attentions
    method = Eviction(score="kvzip")
    reading = Reading.of(model, {"input_ids": ids, "attention_mask": mask}, method)
    for index, layer in reading.cache.compact_layers():
        for row in range(2):
            start = padding if row == 0 else 0
            problem, _ = problem_of(layer, row, method, reading.recorder)
            weights = attentions[index][row, :, tokens + start :, start:tokens]  # query heads, queries, entries
            wanted = weights.unflatten(0, (problem.keys.shape[0], -1)).amax((1, 2))
            torch.testing.assert_close(kvzip_scores(problem)[:, : tokens - start], wanted, atol=1e-5, rtol=1e-4)


def test_the_last_tokens_are_always_recorded():
    recorder = QueryRecorder(limit=10, seed=0)
    recorder.expect(100, torch.ones(1, 500, dtype=torch.bool))
    (positions,) = recorder._positions
    assert positions[-64:].tolist() == list(range(536, 600))
    assert len(positions) == len(set(positions.tolist())) and 64 <= len(positions) <= 74
    assert positions.sort().values.equal(positions)
