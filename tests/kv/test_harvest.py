"""The queries that are recorded, and KVzip's scores of them, against transformers' own attention weights."""

from __future__ import annotations

import pytest
import torch
from tiny import random_ids, tiny_model

from lissom.errors import UserError
from lissom.kv import Eviction
from lissom.kv.compact import Reading, problem_of
from lissom.kv.eviction import kvzip_scores
from lissom.kv.harvest import QueryRecorder, repeat_ids


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
    for limit, last in ((1, 1), (80, 10), (800, 64)):
        recorder = QueryRecorder(limit, seed=0)
        recorder.expect(100, torch.ones(1, 1000, dtype=torch.bool))
        ((positions,),) = recorder._passes
        assert positions[-last:].tolist() == list(range(1100 - last, 1100))
        assert len(set(positions.tolist())) == len(positions) == limit
        assert positions.sort().values.equal(positions)


def test_padding_of_the_repeat_pass_stands_at_the_end_and_the_context_bounds_each_row():
    ids, visible = random_ids(30, rows=2), torch.ones(2, 30, dtype=torch.bool)
    visible[0, :20] = False
    tokens, shown = repeat_ids(ids, visible, None, limit=50)
    assert tokens[0, :10].equal(ids[0, 20:]) and shown[0].sum() == 10 and shown[0, :10].all()
    assert tokens[1].equal(ids[1, :20]) and shown[1].all()  # 30 read, 20 positions are left
    with pytest.raises(UserError, match="fills"):
        repeat_ids(ids, visible, None, limit=30)
