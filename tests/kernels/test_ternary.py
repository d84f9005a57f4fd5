"""Ternary matrices against whole numbers in int64, and their packing against what was packed."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lissom.devices.meters import threads
from lissom.errors import UserError
from lissom.kernels import native, ternary
from lissom.kernels import packed as formats
from lissom.kernels.ternary import TERNARY, TERNARY_2_4

from .test_packed import on

ISAS = (*native.available_isas(), "reference")
FORMATS = (TERNARY, TERNARY_2_4)


def whole_numbers(format: str, rows: int, columns: int, seed: int, zeros: float = 0.3) -> np.ndarray:
    """-1, 0 and 1; in `ternary_2_4` at most two of four that are not zero."""
    random = np.random.default_rng(seed)
    whole = random.choice([-1, 0, 1], (rows, columns), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2])
    if format == TERNARY_2_4:
        padded = np.pad(whole, ((0, 0), (0, -columns % 4))).reshape(rows, -1, 4)
        order = np.argsort(random.random(padded.shape), -1)
        np.put_along_axis(padded, order[..., :2], 0, -1)
        whole = padded.reshape(rows, -1)[:, :columns]
    return whole


def exact(x: torch.Tensor, whole: np.ndarray, scales: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The product with sums in int64, and every other operation rounded to fp32 as it is documented."""
    one = np.float32
    inverse = one(127) / np.maximum(np.abs(x.numpy()).max(-1, keepdims=True), one(1e-5))
    quants = np.rint(x.numpy() * inverse).astype(np.int64)
    out = (quants @ whole.T.astype(np.int64)).astype(one) * (scales[None].astype(one) / inverse)
    return out if bias is None else out + bias


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@given(
    rows=st.integers(1, 290),
    columns=st.integers(1, 400),
    vectors=st.integers(1, 20),
    zeros=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(rows=300, columns=3001, vectors=1, zeros=0.0, bias=True, seed=0)
@settings(max_examples=25, deadline=None)
def test_products_are_exact(isa, format, rows, columns, vectors, zeros, bias, seed):
    whole = whole_numbers(format, rows, columns, seed, zeros)
    random = np.random.default_rng(seed)
    scales = random.uniform(0.01, 1, -(-rows // 16)).astype(np.float32).repeat(16)[:rows]
    size = np.float32(10.0 ** random.integers(-3, 3))
    x = torch.from_numpy(random.standard_normal((vectors, columns)).astype(np.float32) * size)
    added = random.standard_normal(rows).astype(np.float32) if bias else None
    packed = formats.pack_ternary(torch.from_numpy(whole), torch.from_numpy(scales), format)
    got = on(isa, lambda: formats.multiply(x, packed, None if added is None else torch.from_numpy(added)))
    np.testing.assert_array_equal(got.numpy(), exact(x, whole, scales, added))
    unpacked = on(isa, lambda: formats.unpack(packed))
    np.testing.assert_array_equal(unpacked.numpy(), whole * scales[:, None])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("vectors", [1, 9])
def test_several_threads_share_a_matrix(isa, format, vectors):
    whole = whole_numbers(format, 2050, 2700, 0)
    packed = formats.pack_ternary(torch.from_numpy(whole), torch.tensor(0.5), format)
    x = torch.randn(vectors, 2700, generator=torch.Generator().manual_seed(0))
    with threads(2):
        got = on(isa, lambda: formats.multiply(x, packed))
    np.testing.assert_array_equal(got.numpy(), exact(x, whole, np.full(2050, 0.5)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_overflow(isa, format, sign):
    """The largest sums that there are: every activation 127, every weight that may be of one sign."""
    columns = 4800
    whole = np.ones((32, columns), int)
    if format == TERNARY_2_4:
        whole.reshape(32, -1, 4)[..., 2:] = 0
    x = sign * torch.ones(1, columns)
    packed = formats.pack_ternary(torch.from_numpy(whole), torch.tensor(1.0), format)
    got = on(isa, lambda: formats.multiply(x, packed))
    np.testing.assert_array_equal(got.numpy(), exact(x, whole, np.ones(32)))


@pytest.mark.parametrize("format", FORMATS)
def test_size_is_what_the_format_says(format):
    rows, columns = 1024, 2304
    zeros = 0.35 if format == TERNARY else 0.1  # as trained models have; of those that a mask leaves
    whole = torch.from_numpy(whole_numbers(format, rows, columns, 0, zeros))
    whole[:32] = torch.from_numpy(whole_numbers(format, 32, columns, 1, 0.4))  # some rows have more
    packed = formats.pack_ternary(whole, torch.tensor(0.1), format)
    bits = 8 * packed.nbytes / (rows * columns)
    assert bits == pytest.approx(formats.FORMATS[format].bits, rel=0.02)


def test_words_with_two_codes_that_would_be_zero_spill():
    one, none = [1, 0, 0, 0], [0, 0, 0, 0]
    rows = [
        one + none + one,
        none + none + none,
        one + one + one,
        none + one + [0, -1, 0, 1],
        [*none, -1, 0, 0, 0, *none],
    ]
    packed = formats.pack_ternary(torch.tensor(rows), torch.tensor(1.0), TERNARY_2_4)
    assert packed.spills.tolist() == [0 * 32 + 0, 1 * 32 + 3, 2 * 32 + 0, 2 * 32 + 4]
    assert packed.whole()[0].tolist() == rows


@pytest.mark.parametrize(
    "spills,starts",
    [
        ([32 * 17], [0, 1]), ([5], [0, 0]), ([5], [1, 1]), ([], [0, 1]), ([5, 5], [0, 2]), ([7, 5], [0, 2]),
        ([-2], [0, 1]), ([2], [0, 1]), ([65], [-1, 1]),
    ],
    ids=["in padding", "of no tile", "late", "missing", "twice", "out of order", "below", "another code", "early"],
)  # fmt: skip
def test_spills_that_are_not_those_of_the_codes_are_refused(spills, starts):
    spilt = torch.zeros(32, 64, dtype=torch.int8)
    spilt[:, 8] = 1  # `+1 0 0 0` in a word with zeros spills; words of zeros alone do not
    packed = formats.pack_ternary(spilt, torch.tensor(1.0), TERNARY_2_4)
    ternary.check_spills(packed.quants, packed.spills, packed.starts, 64)
    with pytest.raises(UserError, match="damaged"):
        ternary.check_spills(packed.quants, *(torch.tensor(part, dtype=torch.int32) for part in (spills, starts)), 64)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "reference"])
@pytest.mark.parametrize("columns", [1, 5, 61, 397])
def test_unpacking_stays_in_its_buffer(isa, columns):
    """The last code of a row may have inputs that the matrix does not have."""
    packed = formats.pack_ternary(torch.zeros(1, columns), torch.tensor(1.0), TERNARY_2_4)
    buffer = torch.full((columns + 32,), 7.0)
    on(isa, lambda: native.call("unpack", packed.matrix(), ctypes.c_void_p(buffer.data_ptr())))
    assert not buffer[:columns].any() and (buffer[columns:] == 7).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("weight,scale", [(2, 1.0), (0.5, 1.0), (float("nan"), 1.0), (1, float("inf"))])
def test_what_is_not_ternary_is_refused(format, weight, scale):
    whole = torch.zeros(16, 12)
    whole[3, 4] = weight
    with pytest.raises(UserError, match="Ternary weights are -1, 0 and 1"):
        formats.pack_ternary(whole, torch.tensor(scale), format)


@pytest.mark.parametrize("isa", ISAS)
def test_every_word_of_2_4(isa):
    """All 33 ** 3 values that twelve weights have."""
    four = np.array([v for v in itertools.product((-1, 0, 1), repeat=4) if np.count_nonzero(v) <= 2])
    assert len(four) == 33
    whole = four[np.array(list(itertools.product(range(33), repeat=3)))].reshape(-1, 12)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32))
    packed = formats.pack_ternary(torch.from_numpy(whole), torch.tensor(0.5), TERNARY_2_4)
    got = on(isa, lambda: formats.multiply(x, packed))
    np.testing.assert_array_equal(got.numpy(), exact(x, whole, np.full(len(whole), 0.5)))
    np.testing.assert_array_equal(on(isa, lambda: formats.unpack(packed)).numpy(), whole * 0.5)


@pytest.mark.parametrize("format", FORMATS)
def test_activations_that_are_all_zero_or_one_large_one(format):
    whole = whole_numbers(format, 32, 96, 1)
    x = torch.zeros(3, 96)
    x[1, 5], x[2] = 1e30, 1e-30
    packed = formats.pack_ternary(torch.from_numpy(whole), torch.tensor(0.5), format)
    got = formats.multiply(x, packed)
    np.testing.assert_array_equal(got.numpy(), exact(x, whole, np.full(32, 0.5)))
    assert not got[0].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_vector_and_no_other(isa, bad):
    packed = formats.pack_ternary(
        torch.from_numpy(whole_numbers(TERNARY_2_4, 48, 96, 0)), torch.tensor(0.5), TERNARY_2_4
    )
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    x[0, 7] = bad
    got = on(isa, lambda: formats.multiply(x, packed))
    assert not got[0].isfinite().any() and got[1].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_parts_are_views_of_whole_tiles(format):
    whole = whole_numbers(format, 144, 50, 0)
    scales = torch.linspace(0.1, 1, 9).repeat_interleave(16)
    packed = formats.pack_ternary(torch.from_numpy(whole), scales, format)
    for first, rows in ((0, 64), (64, 32), (96, 48)):
        part = packed.part(first, rows)
        assert part.quants.untyped_storage().data_ptr() == packed.quants.untyped_storage().data_ptr()
        assert torch.equal(part.unpack(), packed.unpack()[first : first + rows])
    with pytest.raises(ValueError, match="whole blocks"):
        packed.part(16, 32)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="not 2:4"):
        formats.pack_ternary(torch.tensor([[1, 1, 1, 0]]), torch.tensor(1.0), TERNARY_2_4)
    with pytest.raises(UserError, match="multiple of 16 rows"):
        formats.pack_ternary(torch.zeros(16, 4), torch.arange(16.0), TERNARY)


def test_tokens_are_quantised_by_their_own_largest_value():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 1e-9]])
    quants, inverse = ternary.quantize_tokens(x)
    assert quants.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert inverse.flatten().tolist() == pytest.approx([63.5, 127 / 1e-5])
