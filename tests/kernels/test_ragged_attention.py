from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.kernels import native, ragged_attention, ragged_attention_reference

ISAS = (*native.available_isas(), "reference")


def oracle(query, keys, values, bias, starts, lengths, mask, scale):
    """One query at a time, one entry at a time, in float64."""
    rows, query_heads, queries, size = query.shape
    heads = len(starts) // rows
    out = np.zeros(query.shape)
    for row, head, turn in np.ndindex(rows, query_heads, queries):
        block = row * heads + head * heads // query_heads
        start, length = int(starts[block]), int(lengths[block])
        weights, total = [], np.zeros(size)
        for entry in range(length):
            if mask is None:
                visible = entry < length - (queries - 1 - turn)
            else:
                column = entry - (length - mask.shape[-1])
                visible = column < 0 or bool(mask[row, turn, column])
            if visible:
                logit = scale * np.dot(query[row, head, turn].astype(float), keys[start + entry].astype(float))
                weights.append((logit + (0.0 if bias is None else float(bias[start + entry])), start + entry))
        if weights:
            top = max(logit for logit, _ in weights)
            mass = sum(np.exp(logit - top) for logit, _ in weights)
            for logit, place in weights:
                total += np.exp(logit - top) / mass * values[place].astype(float)
        out[row, head, turn] = total
    return out


def case(seed, rows, heads, group, queries, size, masked, biased, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(queries, 300, (rows * heads,), generator=generator)
    spare = torch.randint(0, 9, (rows * heads,), generator=generator)
    starts = torch.cumsum(lengths + spare, 0) - lengths
    capacity = int(starts[-1] + lengths[-1]) + 5
    keys, values = (torch.full((capacity, size), torch.nan) for _ in range(2))  # spare capacity must not be read
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        keys[start : start + length] = torch.randn(length, size, generator=generator)
        values[start : start + length] = torch.randn(length, size, generator=generator)
    query = torch.randn(rows, heads * group, queries, size, generator=generator) * 2
    bias = torch.randn(capacity, generator=generator) * 3 if biased else None
    mask = None
    if masked:
        mask = torch.rand(rows, queries, queries, generator=generator) < 0.7
    return query.to(dtype), keys.to(dtype), values.to(dtype), bias, starts, lengths, mask, size**-0.5


def run(isa, arguments):
    if isa == "reference":
        return ragged_attention_reference(*arguments)
    before = native.ISA_NAMES[native.library().lissom_get_isa()]
    assert native.set_isa(isa) == isa
    try:
        return ragged_attention(*arguments)
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 2),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 3, 8]),
    queries=st.sampled_from([1, 2, 16]),
    size=st.sampled_from([8, 16, 24, 64]),
    masked=st.booleans(),
    biased=st.booleans(),
)
def test_matches_the_oracle(isa, seed, rows, heads, group, queries, size, masked, biased):
    arguments = case(seed, rows, heads, group, queries, size, masked, biased)
    wanted = oracle(*(a.numpy() if isinstance(a, torch.Tensor) else a for a in arguments))
    np.testing.assert_allclose(run(isa, arguments).numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16(isa):
    arguments = case(3, 2, 2, 3, 2, 64, False, True, torch.bfloat16)
    wide = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in arguments]
    wanted = ragged_attention_reference(*wide)
    assert (run(isa, arguments).float() - wanted).abs().max() < 2e-2


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_logits(isa):
    """Biases of -inf and of ±1e4 neither overflow nor give NaN; a query that sees nothing gives zeros."""
    query, keys, values, _, starts, lengths, _, scale = case(5, 1, 1, 1, 1, 16, False, False)
    bias = torch.zeros(len(keys))
    start, length = int(starts[0]), int(lengths[0])
    bias[start + 1] = 1e4
    bias[start + 2] = -torch.inf
    out = run(isa, (query, keys, values, bias, starts, lengths, None, scale))
    torch.testing.assert_close(out[0, 0, 0], values[start + 1])
    nothing = torch.zeros(1, 1, length, dtype=torch.bool)
    out = run(isa, (query, keys, values, None, starts, lengths, nothing, scale))
    assert out.abs().max() == 0


def test_operator_contract_and_compile():
    arguments = case(7, 1, 2, 2, 1, 16, True, True)
    torch.library.opcheck(torch.ops.lissom.ragged_attention.default, arguments)
    compiled = torch.compile(lambda *a: ragged_attention(*a) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), ragged_attention(*arguments) * 2)
