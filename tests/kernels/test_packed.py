"""Packed matrices against what their formats mean, spelled out weight by weight in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.errors import UserError
from lissom.kernels import native
from lissom.kernels import packed as formats
from lissom.kernels.packed import Packed
from lissom.kernels.ternary import PER_CODE

ISAS = (*native.available_isas(), "reference")
FORMATS = {name: format for name, format in formats.FORMATS.items() if name not in PER_CODE}  # those: test_ternary.py
FLOATS = ("f32", "f16", "bf16")


def made(format: str, rows: int, columns: int, group: int, seed: int) -> tuple[Packed, np.ndarray]:
    """A packed matrix, and the same in float64 by the definition of its format."""
    random = np.random.default_rng(seed)
    if format in FLOATS:
        weight = torch.from_numpy(random.standard_normal((rows, columns)).astype(np.float32))
        return formats.pack_floats(weight, format), weight.to(FORMATS[format].dtype).double().numpy()
    codes = random.integers(0, {"q8": 256, "q6_k": 64}.get(format, 16), (rows, columns))
    bytes_ = torch.from_numpy(codes.astype(np.uint8))

    def halves(*shape):
        return torch.from_numpy(random.uniform(0.001, 0.1, shape)).half()

    if format == "q4_k":
        scales, mins = random.integers(0, 64, (2, rows, columns // 32))
        supers, super_mins = halves(rows, columns // 256), halves(rows, columns // 256)
        packed = formats.pack_q4_k(
            bytes_, torch.from_numpy(scales).byte(), torch.from_numpy(mins).byte(), supers, super_mins
        )
        places = np.arange(columns)
        scale = supers.double().numpy()[:, places // 256] * scales[:, places // 32]
        return packed, scale * codes - super_mins.double().numpy()[:, places // 256] * mins[:, places // 32]
    if format == "q6_k":
        scales = random.integers(-128, 128, (rows, columns // 16))
        supers = halves(rows, columns // 256)
        packed = formats.pack_q6_k(bytes_, torch.from_numpy(scales).to(torch.int8), supers)
        places = np.arange(columns)
        return packed, supers.double().numpy()[:, places // 256] * scales[:, places // 16] * (codes - 32)
    groups = -(-columns // group)
    scales, mins = halves(rows, groups), -halves(rows, groups) if format == "q4_min" else None
    packed = formats.pack_codes(bytes_, scales, mins, format, group)
    place = np.arange(columns) // group
    zero = {"q8": 128, "q4": 8, "q4_min": 0}[format]
    low = 0.0 if mins is None else mins.double().numpy()[:, place]
    return packed, scales.double().numpy()[:, place] * (codes - zero) + low


def rounded(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Activations of one byte as integer formats see them, with one scale for 32; and by how much they may differ, as
    what lies halfway between two codes goes either way."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).numpy().reshape(len(x), -1, 32)
    scale = np.abs(padded).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    exact = padded.astype(np.float64) * inverse
    halfway = np.abs(np.abs(exact % 1) - 0.5) < 1e-4
    seen, slack = ((part * scale).reshape(len(x), -1)[:, : x.shape[1]] for part in (np.rint(exact), halfway))
    return seen, slack


def on(isa: str, work):
    if isa == "reference":
        library, native.library = native.library, lambda: None
        try:
            return work()
        finally:
            native.library = library
    before = native.status().isa
    native.set_isa(isa)
    try:
        return work()
    finally:
        native.set_isa(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("format", FORMATS)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 8),
    odd=st.integers(0, 31),
    group=st.sampled_from([32, 64, 128]),
    vectors=st.integers(1, 40),
    planes=st.sampled_from([1, 2]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_products_are_those_of_the_format(isa, format, rows, columns, odd, group, vectors, planes, seed):
    columns, group = (256 * (1 + columns // 4), 32) if format.endswith("_k") else (32 * columns - odd, group)
    packed, weight = made(format, rows, columns, group, seed)
    x = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((vectors, columns)).astype(np.float32))
    bias = torch.linspace(-1, 1, rows)
    got = on(isa, lambda: formats.multiply(x, packed, bias, planes)).numpy()
    seen, slack, exact = x.double().numpy(), np.zeros(x.shape), 3e-6
    if isa != "reference" and format not in FLOATS:
        if planes == 1:
            seen, slack = rounded(x)
        else:
            exact = 1e-4  # 15 bits and a sign
    if isa == "avx512_bf16" and format == "bf16" and vectors > 16:
        seen = x.bfloat16().double().numpy()
    wanted = seen @ weight.T + bias.numpy()
    allowed = exact * max(1.0, np.abs(wanted).max()) + slack @ np.abs(weight.T)
    assert (np.abs(got - wanted) <= allowed + 1e-5 * np.abs(wanted)).all()
    unpacked = on(isa, lambda: formats.unpack(packed)).numpy()
    np.testing.assert_allclose(unpacked, weight, atol=1e-6 * np.abs(weight).max(), rtol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_do_not_depend_on_their_number(format):
    """A vector's product is the same alone and in a batch, where both are read from the packed weights."""
    packed, _ = made(format, 48, 512, 32, 0)
    x = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    together = formats.multiply(x, packed)
    alone = torch.cat([formats.multiply(row[None], packed) for row in x])
    assert together.equal(alone)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_can_be_selected(format):
    packed, weight = made(format, 40, 256, 32, 3)
    rows = torch.tensor([39, 0, 17, 17, 5])
    np.testing.assert_allclose(packed.select(rows).unpack().numpy(), weight[rows.numpy()], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("format", FORMATS)
def test_shapes_are_those_of_packed_tensors(format):
    packed, _ = made(format, 37, 512, 32, 0)
    shapes = formats.shapes(format, 37, 512)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors().items()} == shapes


def test_bad_matrices_are_refused():
    weight = torch.randn(4, 64)
    weight[2, 3] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        formats.pack_floats(weight, "bf16")
    with pytest.raises(UserError, match="multiple of 32"):
        formats.shapes("q4", 4, 64, group=48)
    with pytest.raises(UserError, match="multiple of 256"):
        formats.shapes("q4_k", 4, 64)
    with pytest.raises(UserError, match="weight format 'q5'"):
        formats.shapes("q5", 4, 64)
    with pytest.raises(UserError, match="too large for f16"):
        formats.pack_floats(torch.full((4, 64), 1e6), "f16")
    codes, scales = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2)
    for format, parts in {"q4": (scales[:, :1], None), "q8": (scales, scales), "q4_min": (scales, None)}.items():
        with pytest.raises(ValueError, match=f"of a {format} matrix have the shape"):
            formats.pack_codes(codes, *parts, format)
    with pytest.raises(ValueError, match="expected"):
        formats.multiply(torch.randn(2, 63), formats.pack_floats(torch.randn(4, 64), "f32"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_shows_in_its_row_and_no_other(format, bad):
    packed, _ = made(format, 19, 512 if format.endswith("_k") else 70, 32, 3)
    for vectors in (1, 2, 20):
        x = torch.randn(vectors, packed.columns)
        damaged = x.clone()
        damaged[-1, packed.columns // 2] = bad
        for isa in ISAS:
            for planes in (1, 2):
                clean, got = (
                    on(isa, lambda v=v, planes=planes: formats.multiply(v, packed, None, planes)) for v in (x, damaged)
                )
                assert got[:-1].equal(clean[:-1]) and not got[-1].isfinite().any(), (isa, planes, vectors)


@pytest.mark.skipif(native.library() is None, reason="no native kernels")
def test_padding_and_extremes_do_not_reach_the_result():
    """Zero vectors, a zero scale and the largest codes: nothing overflows, nothing becomes NaN."""
    codes = torch.full((16, 64), 255, dtype=torch.uint8)
    packed = formats.pack_codes(codes, torch.ones(16, 2), None, "q8")
    x = torch.stack([torch.full((64,), 127.0), torch.zeros(64), torch.full((64,), -127.0)])
    for isa in native.available_isas():
        for planes in (1, 2):
            got = on(isa, lambda planes=planes: formats.multiply(x, packed, None, planes))
            wanted = torch.tensor([127.0 * 127 * 64, 0.0, -127.0 * 127 * 64])
            torch.testing.assert_close(got[:, 0], wanted, rtol=2e-5, atol=0, msg=isa)
