from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.kernels import attention_statistics, native
from lissom.kernels import attention_statistics as public
from lissom.kernels.attention_statistics import REDUCTIONS, Statistics

ISAS = (*native.available_isas(), "off")


@contextmanager
def using(isa):
    """Run with one instruction set, or without the native library."""
    if isa == "off":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            yield
        return
    before = native.status().isa
    assert native.set_isa(isa) == isa
    yield
    native.set_isa(before)


def case(seed, heads, queries, entries, size, causal, hidden, elsewhere):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    bias = normal(heads, entries)
    if hidden:
        bias[torch.rand(bias.shape, generator=generator) < 0.3] = -torch.inf
    return {
        "query": normal(heads, queries, size) * 2,
        "keys": normal(heads, entries, size),
        "values": normal(heads, entries, size),
        "bias": bias,
        "scale": 0.4,
        "positions": torch.randint(0, 50, (heads, entries), generator=generator) if causal else None,
        "query_positions": torch.randint(0, 50, (queries,), generator=generator) if causal else None,
        "elsewhere": normal(heads, queries) * 3 if elsewhere else None,
    }


def oracle(query, keys, values, bias, scale, reduction, positions, query_positions, elsewhere):
    """The whole matrix of weights in float64."""
    q, k, v, b = (part.double().numpy() for part in (query, keys, values, bias))
    logits = np.einsum("hqd,hed->hqe", q, k) * scale + b[:, None]
    if positions is not None:
        logits[positions.numpy()[:, None] > query_positions.numpy()[:, None]] = -np.inf
    top = logits.max(-1)
    top[np.isinf(top)] = 0.0
    features = np.exp(logits - top[..., None])
    mass = features.sum(-1)
    weights = features / mass.clip(1e-30)[..., None]
    wide = mass if elsewhere is None else mass + np.exp(elsewhere.double().numpy() - top)
    scores = {"rms": np.sqrt((weights**2).mean(1)), "mean": weights.mean(1), "max": weights.max(1)}[reduction]
    return Statistics(top, mass, weights @ v, scores, (features / wide.clip(1e-30)[..., None]).max(1))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    heads=st.integers(1, 3),
    queries=st.sampled_from([1, 5, 6, 24, 25, 300, 800, 1600]),  # a tile, a chunk, and beyond
    entries=st.sampled_from([1, 3, 16, 64, 65, 128, 129, 257]),
    size=st.sampled_from([1, 3, 16, 17, 64, 65, 80]),
    reduction=st.sampled_from(REDUCTIONS),
    causal=st.booleans(),
    hidden=st.booleans(),
    elsewhere=st.booleans(),
)
def test_matches_the_oracle(isa, seed, heads, queries, entries, size, reduction, causal, hidden, elsewhere):
    arguments = case(seed, heads, queries, entries, size, causal, hidden, elsewhere)
    with using(isa):
        found = attention_statistics(**arguments, reduction=reduction)
    for name, got, wanted in zip(Statistics._fields, found, oracle(**arguments, reduction=reduction), strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=3e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("isa", ISAS)
def test_without_values_there_are_no_outputs(isa):
    arguments = case(0, 2, 30, 70, 16, True, False, True)
    with using(isa):
        whole, without = attention_statistics(**arguments), attention_statistics(**{**arguments, "values": None})
    assert without.outputs.numel() == 0
    for name in ("top", "mass", "scores", "largest"):
        assert getattr(without, name).equal(getattr(whole, name))


@pytest.mark.parametrize("isa", ISAS)
def test_huge_logits_and_queries_that_see_nothing(isa):
    arguments = case(0, 1, 20, 40, 16, True, False, False)
    arguments["query"][:, :5] *= 1e4
    arguments["query_positions"][7] = -1
    arguments["elsewhere"] = torch.full((1, 20), -torch.inf)
    with using(isa):
        found = attention_statistics(**arguments)
    assert all(part.isfinite().all() for part in found)
    assert found.mass[0, 7] == 0 and not found.outputs[0, 7].any()
    np.testing.assert_allclose(found.mass[:, :5], oracle(**arguments, reduction="rms").mass[:, :5], rtol=1e-2)


@pytest.mark.skipif(not native.available_isas(), reason="no native kernels here")
def test_the_result_does_not_depend_on_the_number_of_threads():
    arguments = case(1, 3, 2000, 300, 64, False, False, True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention_statistics(**arguments))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not native.available_isas(), reason="no native kernels here")
def test_it_goes_on_where_no_more_threads_are_to_be_had():
    code = (
        "import resource, torch; from lissom.kernels import attention_statistics as f;"
        "q, k = torch.randn(3, 2000, 32), torch.randn(3, 300, 32); b = torch.zeros(3, 300);"
        "torch.set_num_threads(1); wanted = f(q, k, k, b, 0.3);"
        "torch.get_num_threads = lambda: 64; used = int(open('/proc/self/statm').read().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20),) * 2);"
        "assert f(q, k, k, b, 0.3).outputs.equal(wanted.outputs)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operator_contract_and_compile():
    arguments = case(2, 2, 10, 20, 8, True, False, True)
    order = ("query", "keys", "values", "bias", "scale", 0, "positions", "query_positions", "elsewhere")
    given = tuple(arguments[name] if isinstance(name, str) else name for name in order)
    torch.library.opcheck(torch.ops.lissom.attention_statistics.default, given)
    compiled = torch.compile(lambda a: public(**a).scores * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments), attention_statistics(**arguments).scores * 2)


@pytest.mark.parametrize(
    "name,shape",
    [("keys", (2, 20, 4)), ("keys", (1, 20, 8)), ("values", (2, 19, 8)), ("bias", (2, 19)), ("elsewhere", (2, 9)),
     ("positions", (2, 19)), ("query_positions", (9,)), ("query", (2, 0, 8))],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(name, shape):
    arguments = case(2, 2, 10, 20, 8, True, False, True)
    arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype)
    with pytest.raises(ValueError):
        attention_statistics(**arguments)
    with pytest.raises(ValueError, match="go together"):
        attention_statistics(**{**case(2, 2, 10, 20, 8, True, False, True), "positions": None})
