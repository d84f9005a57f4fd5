"""Query sources that need a tokenizer, on the real embedded model."""

from __future__ import annotations

import pytest
import torch

from lissom import AttentionMatching, compact
from lissom.evals.texts import planted_documents
from lissom.kv.document import document_ids, question_ids


@pytest.mark.parametrize("queries", ["self-study", "repeat+self-study"])
def test_self_study(smollm2, queries):
    model, tokenizer = smollm2
    ids = document_ids(tokenizer, planted_documents(tokenizer, 1, 200)[0].text)
    method = AttentionMatching(ratio=0.3, queries=queries)
    state = torch.random.get_rng_state()
    cache = compact(model, ids, method, tokenizer=tokenizer, self_study_tokens=8)
    assert torch.random.get_rng_state().equal(state)
    again = compact(model, ids, method, tokenizer=tokenizer, self_study_tokens=8)
    assert cache.get_seq_length() == ids.shape[1]
    assert cache.stored_entries == 90 * round(0.3 * ids.shape[1])
    for (_, one), (_, two) in zip(cache.compact_layers(), again.compact_layers(), strict=True):
        torch.testing.assert_close(one.store.values, two.store.values)
    question = question_ids(tokenizer, "What is this?")
    with torch.no_grad():
        assert model(question, past_key_values=cache).logits.isfinite().all()
