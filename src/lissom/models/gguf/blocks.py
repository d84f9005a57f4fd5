"""Blocks of GGUF as packed matrices and back, without loss.

The blocks are those of ggml-common.h in https://github.com/ggml-org/ggml; `gguf.quants` holds their meaning in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from gguf import GGML_QUANT_SIZES, dequantize, quantize
from gguf import GGMLQuantizationType as Kind

from lissom.errors import UserError
from lissom.kernels import packed as formats
from lissom.kernels.packed import GROUP, Packed


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: moving bytes gains nothing from more, and on a busy machine threads that wait for each
    other at every small operation make it ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pack(data: torch.Tensor, kind: Kind) -> Packed:
    """The matrix whose rows are `data`, uint8 `[rows, bytes of a row]`.

    Raises:
        UserError: the type has no packed format, or a scale is NaN or infinite.
    """
    if kind not in _READERS:
        raise UserError(f"is of type {kind.name}: supported are {', '.join(known.name for known in _READERS)}.")
    size = GGML_QUANT_SIZES[kind][1]
    return _READERS[kind](data.view(len(data), -1, size))


def dense(data: torch.Tensor, kind: Kind) -> torch.Tensor:
    """fp32 `[rows, columns]`: what the rows of `pack` stand for, also of types that have no packed format.

    Raises:
        UserError: nobody knows the type, or a value is NaN or infinite.
    """
    if kind in _READERS:
        return formats.unpack(pack(data, kind))
    try:
        values = torch.from_numpy(dequantize(data.contiguous().numpy(), kind))
    except NotImplementedError as error:
        raise UserError(f"is of type {kind.name}, which cannot be read.") from error
    formats.check_finite(values)
    return values


def floats(data: torch.Tensor, kind: Kind) -> torch.Tensor:
    """fp32 values of a tensor that is stored in floating point."""
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(kind)
    if dtype is None:
        raise UserError(f"is of type {kind.name}: a norm or a bias is F32, F16 or BF16.")
    values = _as(data, dtype).float()
    formats.check_finite(values)
    return values


def _as(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes `[..., n]` as values `[..., n / itemsize]`."""
    # A view of the file need not be aligned for the dtype, and a slice of a block never is.
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def _scales(data: torch.Tensor) -> torch.Tensor:
    """fp16 scales from two bytes in every block `[rows, blocks, 2]`."""
    scales = _as(data, torch.float16).squeeze(-1)
    if not bool(torch.isfinite(scales).all()):
        raise UserError("has scales that are NaN or infinite: the file is damaged.")
    return scales


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """`[rows, blocks, n]` bytes to `[rows, blocks, 2n]`: all lower halves, then all upper ones."""
    return torch.cat([data & 15, data >> 4], -1)


def _read_floats(dtype: torch.dtype) -> Callable[[torch.Tensor], Packed]:
    def read(blocks: torch.Tensor) -> Packed:
        return formats.pack_floats(_as(blocks.flatten(1), dtype), formats.OF_DTYPE[dtype])

    return read


def _read_q8_0(blocks: torch.Tensor) -> Packed:
    codes = (blocks[..., 2:] ^ 128).flatten(1)  # from signed to value + 128
    return formats.pack_codes(codes, _scales(blocks[..., :2]), None, "q8")


def _read_q4_0(blocks: torch.Tensor) -> Packed:
    return formats.pack_codes(_nibbles(blocks[..., 2:]).flatten(1), _scales(blocks[..., :2]), None, "q4")


def _read_q4_1(blocks: torch.Tensor) -> Packed:
    codes = _nibbles(blocks[..., 4:]).flatten(1)
    return formats.pack_codes(codes, _scales(blocks[..., :2]), _scales(blocks[..., 2:4]), "q4_min")


def _read_q5_0(blocks: torch.Tensor) -> Packed:
    places = torch.arange(8, dtype=torch.uint8)
    fifth = (blocks[..., 2:6, None] >> places & 1).flatten(-2)  # bit i of 32 belongs to input i
    codes = (_nibbles(blocks[..., 6:]) | fifth << 4) + (128 - 16)
    return formats.pack_codes(codes.flatten(1), _scales(blocks[..., :2]), None, "q8")


def _read_q4_k(blocks: torch.Tensor) -> Packed:
    six = blocks[..., 4:16]  # 8 scales and 8 mins of 6 bits
    low, middle, high = six[..., :4], six[..., 4:8], six[..., 8:]
    scales = torch.cat([low & 63, (high & 15) | low >> 6 << 4], -1)
    mins = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], -1)
    codes = _nibbles(blocks[..., 16:].unflatten(-1, (4, 32)))  # 64 inputs to 32 bytes
    return formats.pack_q4_k(
        codes.flatten(1), scales.flatten(1), mins.flatten(1), _scales(blocks[..., :2]), _scales(blocks[..., 2:4])
    )


def _read_q6_k(blocks: torch.Tensor) -> Packed:
    low = _nibbles(blocks[..., :128].unflatten(-1, (2, 64)))  # 128 inputs to 64 bytes
    upper = blocks[..., 128:192].unflatten(-1, (2, 32))
    high = torch.cat([upper >> place & 3 for place in (0, 2, 4, 6)], -1)
    scales = _as(blocks[..., 192:208], torch.int8)
    return formats.pack_q6_k((low | high << 4).flatten(1), scales.flatten(1), _scales(blocks[..., 208:]))


_READERS: dict[Kind, Callable[[torch.Tensor], Packed]] = {
    Kind.F32: _read_floats(torch.float32),
    Kind.F16: _read_floats(torch.float16),
    Kind.BF16: _read_floats(torch.bfloat16),
    Kind.Q8_0: _read_q8_0,
    Kind.Q4_0: _read_q4_0,
    Kind.Q4_1: _read_q4_1,
    Kind.Q5_0: _read_q5_0,
    Kind.Q4_K: _read_q4_k,
    Kind.Q6_K: _read_q6_k,
}


# ---- from packed to blocks

_KINDS = {
    "f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16,
    "q8": Kind.Q8_0, "q4": Kind.Q4_0, "q4_min": Kind.Q4_1, "q4_k": Kind.Q4_K, "q6_k": Kind.Q6_K,
}  # fmt: skip


def kind_of(packed: Packed) -> Kind:
    """The type that holds `packed` without loss: F32 where its columns do not fill blocks."""
    kind = _KINDS[packed.format]
    return Kind.F32 if packed.columns % GGML_QUANT_SIZES[kind][0] else kind


def ternary_rows(packed: Packed, kind: Kind) -> torch.Tensor:
    """A ternary matrix in blocks of TQ1_0 or TQ2_0, uint8 `[rows, bytes of a row]`: its scale is rounded to fp16."""
    return torch.from_numpy(quantize(packed.unpack().cpu().numpy(), kind))


def unpack(packed: Packed) -> torch.Tensor:
    """`packed` in blocks of `kind_of(packed)`, uint8 `[rows, bytes of a row]`.

    GGUF has no groups of more than 32 inputs: their scale is repeated, and loses nothing.
    """
    kind = kind_of(packed)
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        # To fp32 and back is exact, and F32 is also what holds codes times scales.
        dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
        return packed.unpack().to(dtype).view(torch.uint8)
    return _WRITERS[packed.format](packed).flatten(1)


def _codes(packed: Packed, quants: torch.Tensor, parts: int) -> torch.Tensor:
    """uint8 `[rows, columns]` of lines that hold `parts` chunks of 4 inputs in a byte each."""
    lines = quants.permute(0, 3, 1, 2, 4)  # [blocks, 16, groups, lines, 4]
    bits = 8 // parts
    chunks = torch.stack([lines >> bits * part & (1 << bits) - 1 for part in range(parts)], 4)
    return chunks.reshape(-1, chunks.shape[2] * GROUP)[: packed.rows, : packed.columns]


def _lanes(packed: Packed, name: str) -> torch.Tensor:
    """`[rows, n]` of scales `[blocks, n, 16]`."""
    return getattr(packed, name).transpose(1, 2).flatten(0, 1)[: packed.rows]


def _raw(values: torch.Tensor) -> torch.Tensor:
    """`[rows, n]` fp16 to bytes `[rows, n, 2]`."""
    return values.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))


def _grouped(packed: Packed, name: str) -> torch.Tensor:
    repeated = _lanes(packed, name).repeat_interleave(packed.group // GROUP, 1)
    return _raw(repeated[:, : packed.columns // GROUP])


def _halves(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `_nibbles`."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def _write_q8_0(packed: Packed) -> torch.Tensor:
    codes = (_codes(packed, packed.quants, 1) ^ 128).unflatten(1, (-1, GROUP))
    return torch.cat([_grouped(packed, "scales"), codes], -1)


def _write_q4(packed: Packed) -> torch.Tensor:
    codes = _halves(_codes(packed, packed.quants, 2).unflatten(1, (-1, GROUP)))
    return torch.cat([*(_grouped(packed, name) for name in formats.FORMATS[packed.format].tensors), codes], -1)


def _write_q4_k(packed: Packed) -> torch.Tensor:
    assert packed.supers is not None
    scales, mins = (_lanes(packed, name).unflatten(1, (-1, 8)) for name in ("scales", "mins"))
    low, high, low_min, high_min = scales[..., :4], scales[..., 4:], mins[..., :4], mins[..., 4:]
    six = torch.cat([low | high >> 4 << 6, low_min | high_min >> 4 << 6, high & 15 | (high_min & 15) << 4], -1)
    supers = packed.supers.permute(0, 3, 1, 2).flatten(0, 1)[: packed.rows]  # [rows, n, 2]
    codes = _halves(_codes(packed, packed.quants, 2).unflatten(1, (-1, 4, 64))).flatten(-2)
    return torch.cat([supers.contiguous().view(torch.uint8), six, codes], -1)


def _write_q6_k(packed: Packed) -> torch.Tensor:
    assert packed.high is not None
    low = _halves(_codes(packed, packed.quants, 2).unflatten(1, (-1, 2, 128))).flatten(-2)
    quarters = _codes(packed, packed.high, 4).unflatten(1, (-1, 2, 4, 32)).unbind(-2)
    high = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    scales = _lanes(packed, "scales").contiguous().view(torch.uint8).unflatten(1, (-1, 16))
    return torch.cat([low, high.flatten(-2), scales, _raw(_lanes(packed, "supers"))], -1)


_WRITERS: dict[str, Callable[[Packed], torch.Tensor]] = {
    "q8": _write_q8_0,
    "q4": _write_q4,
    "q4_min": _write_q4,
    "q4_k": _write_q4_k,
    "q6_k": _write_q6_k,
}
