from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
    before = native.status().isa
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


def _large_problem(seed=0):
    """Enough work for every thread of the pool."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([3000, 2500, 2800, 3100])
    starts = torch.cumsum(lengths, 0) - lengths
    keys, values = (torch.randn(int(lengths.sum()), 64, generator=generator) for _ in range(2))
    query = torch.randn(2, 6, 1, 64, generator=generator)
    return query, keys, values, None, starts, lengths, None, 0.125


@pytest.mark.skipif(not native.available_isas(), reason="no native kernels here")
def test_the_pool_survives_a_fork():
    arguments = _large_problem()
    wanted = ragged_attention_reference(*arguments)
    torch.testing.assert_close(ragged_attention(*arguments), wanted, atol=1e-5, rtol=1e-4)
    child = os.fork()
    if child == 0:  # only the forking thread is here
        good = all(torch.allclose(ragged_attention(*arguments), wanted, atol=1e-5) for _ in range(20))
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    torch.testing.assert_close(ragged_attention(*arguments), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not native.available_isas(), reason="no native kernels here")
def test_two_callers_at_once():
    problems = [_large_problem(seed) for seed in range(4)]
    wanted = [ragged_attention_reference(*problem) for problem in problems]

    def work(number):
        return all(torch.allclose(ragged_attention(*problems[number]), wanted[number], atol=1e-5) for _ in range(40))

    with ThreadPoolExecutor(4) as executor:
        assert all(executor.map(work, range(4)))


@pytest.mark.slow
def test_without_a_compiler_a_pure_wheel_works(tmp_path):
    """The wheel is built with nothing on PATH that compiles; it must import, compute, and say why it is slow."""
    root = Path(__file__).parents[2]
    for name in ("src", "csrc"):
        shutil.copytree(root / name, tmp_path / "tree" / name)
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path / "tree")
    empty = tmp_path / "bin"
    empty.mkdir()
    env = {**os.environ, "PATH": str(empty), "CC": "/nonexistent", "CXX": "/nonexistent"}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tmp_path / "tree")]
    subprocess.run(command, check=True, env=env)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import torch; from lissom.kernels import native, ragged_attention as f;"
        "assert not native.status().available and 'compiler' in native.status().reason;"
        "ones = torch.ones(2, 4); start, length = torch.tensor([0]), torch.tensor([2]);"
        "print(f(torch.ones(1, 1, 1, 4), ones, ones, None, start, length, None, 1.0))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "1., 1., 1., 1." in done.stdout, done.stderr


@pytest.mark.parametrize("change", ["view", "bfloat16 bias", "int32 lengths"])
def test_any_strides_and_dtypes_mean_the_same(change):
    query, keys, values = torch.randn(1, 4, 2, 8), torch.randn(20, 16)[:, :8], torch.randn(20, 8)
    bias, starts, lengths = torch.randn(20), torch.tensor([0, 9]), torch.tensor([7, 11])
    if change != "view":
        keys = keys.contiguous()
    if change == "bfloat16 bias":
        bias = bias.bfloat16()
    if change == "int32 lengths":
        starts, lengths = torch.tensor([0, 9, 0], dtype=torch.int32)[:2], lengths.int()
    arguments = query, keys, values, bias, starts, lengths, None, 0.3
    torch.testing.assert_close(
        ragged_attention(*arguments), ragged_attention_reference(*arguments), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("starts,lengths", [([0, 15], [7, 6]), ([-1, 9], [7, 11]), ([0, 9], [-2, 11])])
def test_a_block_outside_the_buffers_is_refused(starts, lengths):
    query, keys = torch.randn(1, 4, 2, 8), torch.randn(20, 8)
    with pytest.raises(ValueError, match="outside"):
        ragged_attention(query, keys, keys, None, torch.tensor(starts), torch.tensor(lengths), None, 1.0)


@pytest.mark.parametrize("shapes", [((20, 8), (20, 4)), ((20, 8), (19, 8)), ((20, 4), (20, 4))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    keys, values = (torch.randn(shape) for shape in shapes)
    with pytest.raises(ValueError, match="expected"):
        ragged_attention(
            torch.randn(1, 4, 2, 8), keys, values, None, torch.tensor([0, 9]), torch.tensor([7, 9]), None, 1.0
        )
