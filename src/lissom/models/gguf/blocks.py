"""Blocks of GGUF as packed matrices and back, without loss.

The blocks are those of ggml-common.h in https://github.com/ggml-org/ggml; `gguf.quants` holds their meaning in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from lissom.errors import UserError
from lissom.kernels import packed as formats
from lissom.kernels.packed import Packed


def pack(data: torch.Tensor, kind: Kind) -> Packed:
    """The matrix whose rows are `data`, uint8 `[rows, bytes of a row]`.

    Raises:
        UserError: the type has no packed format, or a scale is NaN or infinite.
    """
    if kind not in _READERS:
        raise UserError(f"is of type {kind.name}: supported are {', '.join(known.name for known in _READERS)}.")
    size = GGML_QUANT_SIZES[kind][1]
    return _READERS[kind](data.view(len(data), -1, size))


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
