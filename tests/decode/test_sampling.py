from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lissom.decode.sampling import Sampler, Sampling, candidates, penalised
from lissom.errors import UserError


@given(
    vocabulary=st.integers(2, 3000),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_candidates_are_those_of_transformers(vocabulary, top_k, top_p, min_p, spread, seed):
    logits = torch.randn(2, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    values, places = candidates(logits, top_k, top_p, min_p)
    got = torch.full_like(logits, -torch.inf).scatter(1, places, values)
    wanted = logits
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    if min_p > 0:
        wanted = MinPLogitsWarper(min_p)(None, wanted)
    # Tokens at the very edge of the mass may fall on either side of it.
    different = (got.isfinite() != wanted.isfinite()).sum()
    assert different <= (1 if 0 < top_p < 1 else 0)
    assert bool(got.isfinite().any(-1).all())


def test_penalties_are_those_of_transformers():
    logits, seen = torch.randn(3, 50), torch.randint(0, 50, (3, 20))
    torch.testing.assert_close(penalised(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(seen, logits))
    torch.testing.assert_close(TemperatureLogitsWarper(0.5)(None, logits), logits / 0.5)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -20.0]]).expand(20000, -1)
    for sampling, kept in ((Sampling(temperature=0.7), 5), (Sampling(temperature=1.0, top_k=2), 2)):
        tokens = Sampler(sampling, torch.zeros(20000, 1, dtype=torch.int64)).draw(logits)
        shares = np.bincount(tokens.numpy(), minlength=5) / 20000
        wanted = (logits[0] / sampling.temperature).masked_fill(torch.arange(5) >= kept, -torch.inf).softmax(0)
        np.testing.assert_allclose(shares, wanted.numpy(), atol=0.012)


def test_the_same_seed_draws_the_same_tokens():
    logits, ids = torch.randn(1, 100), torch.zeros(1, 1, dtype=torch.int64)
    draws = [
        [Sampler(Sampling(temperature=1.0, seed=seed), ids).draw(logits).item() for seed in range(20)] for _ in "ab"
    ]
    assert draws[0] == draws[1] and len(set(draws[0])) > 5


@pytest.mark.parametrize("settings", [{"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"temperature": 1e-5}, {"min_p": 2}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)


@pytest.mark.parametrize(
    "top_k,top_p,min_p", [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.05), (30, 0.9, 0.02)]
)
@pytest.mark.parametrize("temperature,penalty", [(0.7, 1.0), (1.3, 1.2), (1.0, 0.8)])
def test_the_distribution_is_that_of_transformers(temperature, penalty, top_k, top_p, min_p):
    """All settings together, in transformers' order."""
    generator = torch.Generator().manual_seed(0)
    logits, seen = 3 * torch.randn(4, 700, generator=generator), torch.randint(0, 700, (4, 30), generator=generator)
    given = {"temperature": temperature, "repetition_penalty": penalty, "top_p": top_p, "do_sample": True}
    config = GenerationConfig(**given, top_k=top_k or None, min_p=min_p or None)
    processors = tiny_model("llama")._get_logits_processor(config, input_ids_seq_length=30, encoder_input_ids=seen)
    wanted = processors(seen, logits).softmax(-1)
    values, places = candidates(penalised(logits, seen, penalty) / temperature, top_k, top_p, min_p)
    got = torch.zeros_like(logits).scatter(1, places, values.softmax(-1))
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)
    assert len(processors) == sum([temperature != 1, penalty != 1, top_k > 0, top_p < 1, min_p > 0])


def test_padding_is_not_penalised():
    ids, logits = torch.tensor([[3, 3, 5, 6], [3, 1, 5, 6]]), torch.zeros(2, 9)
    logits[:, 3], logits[:, 4] = 2.0, 1.9
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert Sampler(Sampling(repetition_penalty=2.0), ids, mask).draw(logits).tolist() == [3, 4]
