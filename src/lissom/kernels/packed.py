"""Packed matrices: the formats in which weights lie in memory, their products, and their meaning in plain PyTorch.

Every format interleaves blocks of 16 output rows, so that a vector register holds the same inputs of all of them (the
ternary ones two blocks together, see `ternary.py`). The native kernels and files on disk share this layout; it does not
depend on the processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lissom.errors import UserError
from lissom.kernels import native, ternary
from lissom.kernels.ternary import PER_CODE, TERNARY, TERNARY_2_4

BLOCK = 16  # interleaved output rows
GROUP = 32  # inputs of a group: what the activations share a scale in
SUPER = 256  # inputs of a super-block of the K formats


@dataclass(frozen=True)
class Format:
    """How weights are stored.

    Attributes:
        code: number in csrc/kernels.h.
        bits: per weight, without scales.
        tensors: names of the tensors that `Packed` has besides `quants`.
        dtype: of floating point formats.
    """

    code: int
    bits: float
    tensors: tuple[str, ...] = ()
    dtype: torch.dtype | None = None


FORMATS = {
    "f32": Format(0, 32, dtype=torch.float32),
    "f16": Format(1, 16, dtype=torch.float16),
    "bf16": Format(2, 16, dtype=torch.bfloat16),
    "q8": Format(3, 8, ("scales",)),
    "q4": Format(4, 4, ("scales",)),
    "q4_min": Format(5, 4, ("scales", "mins")),
    "q4_k": Format(6, 4, ("scales", "mins", "supers")),
    "q6_k": Format(7, 6, ("high", "scales", "supers")),
    TERNARY: Format(8, 16 / 9, ("scales",)),
    TERNARY_2_4: Format(9, 16 / 12, ("scales", "spills", "starts")),
}
OF_DTYPE = {format.dtype: name for name, format in FORMATS.items() if format.dtype is not None}


class Matrix(ctypes.Structure):
    """Mirror of `struct Matrix` in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("format", "rows", "columns", "group")),
        *((name, ctypes.c_void_p) for name in ("quants", "high", "scales", "mins", "supers")),
        *((name, ctypes.c_void_p) for name in ("spills", "starts", "bias")),
    )


native.mirror(0, Matrix)


@dataclass
class Packed:
    """A matrix `[rows, columns]` (output and input features) in one of `FORMATS`.

    With `blocks = ceil(rows / 16)` and `groups = ceil(columns / 32)`:

    Attributes:
        format: name of the format.
        rows, columns: of the matrix.
        group: inputs that share a scale; of `ternary_2_4` the number of spills.
        quants: floating point `[blocks, columns, 16]`, bf16 `[blocks, ceil(columns / 2), 16, 2]`; uint8 codes
            `[blocks, groups, 8, 16, 4]` of q8, nibbles `[blocks, groups, 4, 16, 4]` of the others, inputs 8c.. in the
            lower and 8c + 4.. in the upper half.
        scales: fp16 `[blocks, columns / group, 16]`; bytes per 32 (q4_k) or 16 inputs (q6_k).
        mins: as `scales`, added.
        supers: fp16 `[blocks, columns / 256, 2, 16]` (scale and min of q4_k), `[blocks, columns / 256, 16]` (q6_k).
        high: the upper two bits of q6_k, uint8 `[blocks, groups, 2, 16, 4]`, four chunks to a byte.
        spills, starts: of `ternary_2_4`, int32 `[group]`, and where those of each 32 rows begin, int32
            `[ceil(rows / 32) + 1]`; see `ternary.py`. The ternary formats have words of 16 bits
            `[ceil(rows / 32), words, 32, 2 bytes]` as `quants`, and one fp32 scale for each block `[blocks]`.
    """

    format: str
    rows: int
    columns: int
    quants: torch.Tensor
    group: int = GROUP
    scales: torch.Tensor | None = None
    mins: torch.Tensor | None = None
    supers: torch.Tensor | None = None
    high: torch.Tensor | None = None
    spills: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is stored, by name."""
        names = ("quants", *FORMATS[self.format].tensors)
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """Bytes of the weights and their scales."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def matrix(self, bias: torch.Tensor | None = None) -> Matrix:
        """The native kernels' view. It does not keep the tensors alive; `bias` is fp32 `[rows]`, padded to blocks."""
        pointers = {name: tensor.data_ptr() for name, tensor in self.tensors().items()}
        if bias is not None:
            pointers["bias"] = bias.data_ptr()
        return Matrix(FORMATS[self.format].code, self.rows, self.columns, self.group, **pointers)

    def unpack(self) -> torch.Tensor:
        """The matrix in fp32 `[rows, columns]`: what the format means."""
        return _UNPACK.get(self.format, _unpack_floats)(self)[: self.rows, : self.columns].contiguous()

    def select(self, rows: torch.Tensor) -> Packed:
        """The matrix of these rows `[n]`, in their order; of a ternary one, whose rows share scales, in fp32."""
        if self.format in PER_CODE:
            whole, scales = self.whole()
            return pack_floats(whole[rows] * scales[rows, None], "f32")

        def taken(name: str, tensor: torch.Tensor) -> torch.Tensor:
            axis = 3 if tensor.ndim == 5 or (name == "supers" and tensor.ndim == 4) else 2
            lanes = tensor.movedim(axis, 1)[rows // BLOCK, rows % BLOCK]  # [n, ...]
            lanes = F.pad(lanes, (0, 0) * (lanes.ndim - 1) + (0, -len(rows) % BLOCK))
            return lanes.unflatten(0, (-1, BLOCK)).movedim(1, axis).contiguous()

        parts = {name: taken(name, tensor) for name, tensor in self.tensors().items()}
        return Packed(self.format, len(rows), self.columns, group=self.group, **parts)

    def check(self, name: str) -> None:
        """Raise a `UserError` that names the matrix where scales or spills are none that packing writes."""
        for part, tensor in self.tensors().items():
            if part != "quants" and tensor.is_floating_point():
                check_finite(tensor, f"{name}.{part}")
        if self.spills is not None and self.starts is not None:
            ternary.check_spills(self.quants, self.spills, self.starts, self.columns)

    @property
    def row_step(self) -> int:
        """Rows that are stored together: a part of a matrix must begin at a multiple of them."""
        return ternary.ROWS if self.format in PER_CODE else BLOCK

    def part(self, first: int, rows: int) -> Packed:
        """Rows from `first` on, without a copy.

        Raises:
            ValueError: it does not begin, or not end, between rows that are stored together.
        """
        end = first + rows
        if first % self.row_step or (end % self.row_step and end != self.rows):
            raise ValueError(f"Rows {first} to {end} are no whole blocks of {self.row_step}.")

        def taken(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if name == "spills":
                return tensor
            step = BLOCK if name == "scales" else self.row_step
            return tensor[first // step : -(-end // step) + (name == "starts")]

        parts = {name: taken(name, tensor) for name, tensor in self.tensors().items()}
        return Packed(self.format, rows, self.columns, group=self.group, **parts)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a ternary format: -1, 0 and 1, int8 `[rows, columns]`, and fp32 scales `[rows]`."""
        assert self.scales is not None
        whole = ternary.whole_of(self.format, self.quants, self.spills, self.starts)
        return whole[: self.rows, : self.columns], self.scales.repeat_interleave(BLOCK)[: self.rows]

    def to(self, device: torch.device | str) -> Packed:
        """On another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Packed(self.format, self.rows, self.columns, group=self.group, **moved)


def shapes(format: str, rows: int, columns: int, group: int = GROUP) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a packed matrix.

    Raises:
        UserError: the format is unknown, or the group or the columns do not fit it.
    """
    if format not in FORMATS:
        raise UserError(f"There is no weight format {format!r}: expected one of {', '.join(FORMATS)}.")
    if format in PER_CODE:
        if group < 0:
            raise UserError(f"{group} spills: expected a number from 0.")
        return ternary.shapes(format, rows, columns, group)
    if group < GROUP or group % GROUP:
        raise UserError(f"A group of {group} inputs: expected a multiple of {GROUP}.")
    kind, blocks, groups = FORMATS[format], -(-rows // BLOCK), -(-columns // GROUP)
    if kind.dtype is not None:
        even = columns + columns % 2
        shape = (blocks, even // 2, BLOCK, 2) if format == "bf16" else (blocks, even, BLOCK)
        return {"quants": (shape, kind.dtype)}
    if format.endswith("_k") and columns % SUPER:
        raise UserError(f"{format} needs a multiple of {SUPER} inputs; the matrix has {columns}.")
    byte, half = torch.uint8, torch.float16
    found: dict[str, tuple[tuple[int, ...], torch.dtype]]
    found = {"quants": ((blocks, groups, 8 if format == "q8" else 4, BLOCK, 4), byte)}
    per_scale = group if not format.endswith("_k") else GROUP
    scales = (blocks, -(-columns // per_scale), BLOCK)
    if format == "q4_k":
        found |= {"scales": (scales, byte), "mins": (scales, byte)}
        found["supers"] = ((blocks, columns // SUPER, 2, BLOCK), half)
    elif format == "q6_k":
        found["high"] = ((blocks, groups, 2, BLOCK, 4), byte)
        found["scales"] = ((blocks, 2 * groups, BLOCK), torch.int8)
        found["supers"] = ((blocks, columns // SUPER, BLOCK), half)
    else:
        found |= {name: (scales, half) for name in kind.tensors}
    return found


def interleave(matrix: torch.Tensor) -> torch.Tensor:
    """`[rows, n, ...]` to `[blocks, n, 16, ...]`; missing rows are zero."""
    rows = matrix.shape[0]
    matrix = F.pad(matrix, (0, 0) * (matrix.ndim - 1) + (0, -rows % BLOCK))
    return matrix.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def _deinterleave(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.transpose(1, 2).flatten(0, 1)


def pack_floats(weight: torch.Tensor, format: str) -> Packed:
    """`weight` `[rows, columns]` in a floating point format.

    Raises:
        UserError: a weight is not a finite number, or too large for the format.
    """
    check_finite(weight)
    rows, columns = weight.shape
    stored = F.pad(weight.detach().to(FORMATS[format].dtype), (0, columns % 2))
    if stored.dtype != weight.dtype and not bool(torch.isfinite(stored).all()):
        raise UserError(f"A weight matrix has values that are too large for {format}.")
    quants = interleave(stored.unflatten(1, (-1, 2)) if format == "bf16" else stored)
    return Packed(format, rows, columns, quants)


def pack_codes(
    codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor | None, format: str, group: int = GROUP
) -> Packed:
    """A matrix from codes and scales.

    Args:
        codes: uint8 `[rows, columns]`: q8 value + 128, q4 value + 8, q4_min value.
        scales: `[rows, ceil(columns / group)]`, stored in fp16.
        mins: the same for q4_min, else None.

    Raises:
        UserError: the format is unknown, or the group does not fit it.
        ValueError: scales or minima are missing, too many, or of another shape.
    """
    rows, columns = codes.shape
    shapes(format, rows, columns, group)
    for name, given in (("scales", scales), ("mins", mins)):
        shape = None if given is None else tuple(given.shape)
        wanted = (rows, -(-columns // group)) if name in FORMATS[format].tensors else None
        if shape != wanted:
            raise ValueError(f"{name} of a {format} matrix have the shape {shape}, expected {wanted}.")
    # A code that means zero: what is multiplied with the padding is zero anyway.
    codes = F.pad(codes, (0, -columns % GROUP)).unflatten(1, (-1, 8, 4))
    if format != "q8":
        codes = codes[:, :, 0::2] | codes[:, :, 1::2] << 4
    return Packed(
        format,
        rows,
        columns,
        _interleave_groups(codes),
        group,
        interleave(scales.to(torch.float16)),
        None if mins is None else interleave(mins.to(torch.float16)),
    )


def _interleave_groups(codes: torch.Tensor) -> torch.Tensor:
    """`[rows, groups, lines, 4]` to `[blocks, groups, lines, 16, 4]`."""
    return interleave(codes.flatten(1, 2)).unflatten(1, codes.shape[1:3])


def pack_q4_k(
    codes: torch.Tensor, scales: torch.Tensor, mins: torch.Tensor, supers: torch.Tensor, super_mins: torch.Tensor
) -> Packed:
    """A q4_k matrix: `codes` `[rows, columns]`, `scales` and `mins` uint8 `[rows, columns / 32]`, `supers` and
    `super_mins` `[rows, columns / 256]`; value = super * scale * code - super_min * min."""
    rows, columns = codes.shape
    shapes("q4_k", rows, columns)
    codes = codes.unflatten(1, (-1, 8, 4))
    both = torch.stack([supers, super_mins], -1).to(torch.float16)
    return Packed(
        "q4_k",
        rows,
        columns,
        _interleave_groups(codes[:, :, 0::2] | codes[:, :, 1::2] << 4),
        scales=interleave(scales),
        mins=interleave(mins),
        supers=interleave(both).transpose(2, 3).contiguous(),
    )


def pack_q6_k(codes: torch.Tensor, scales: torch.Tensor, supers: torch.Tensor) -> Packed:
    """A q6_k matrix: `codes` uint8 `[rows, columns]` (value + 32), `scales` int8 `[rows, columns / 16]`, `supers`
    `[rows, columns / 256]`; value = super * scale * (code - 32)."""
    rows, columns = codes.shape
    shapes("q6_k", rows, columns)
    codes = codes.unflatten(1, (-1, 8, 4))
    low, high = codes & 15, codes >> 4
    upper = sum(high[:, :, place::4] << 2 * place for place in range(4))
    assert isinstance(upper, torch.Tensor)
    return Packed(
        "q6_k",
        rows,
        columns,
        _interleave_groups(low[:, :, 0::2] | low[:, :, 1::2] << 4),
        high=_interleave_groups(upper),
        scales=interleave(scales),
        supers=interleave(supers.to(torch.float16)),
    )


def pack_ternary(whole: torch.Tensor, scales: torch.Tensor, format: str) -> Packed:
    """A ternary matrix; see `ternary.pack` for what is expected, and what is refused."""
    tensors = ternary.pack(whole, scales, format)
    spills = len(tensors["spills"]) if "spills" in tensors else 0
    return Packed(format, whole.shape[0], whole.shape[1], group=spills, **tensors)


def check_finite(weight: torch.Tensor, name: str = "A weight matrix") -> None:
    """Raise a `UserError` where a weight is NaN or infinite."""
    if not bool(torch.isfinite(weight).all()):
        raise UserError(f"{name} has NaN or infinite values: the model is damaged.")


def _codes(packed: Packed) -> torch.Tensor:
    """Codes `[rows, columns]`, both padded, fp32."""
    lines = packed.quants.flatten(1, 2)  # [blocks, groups * lines, 16, 4]
    rows = _deinterleave(lines).unflatten(1, packed.quants.shape[1:3])
    if packed.format != "q8":
        rows = torch.stack([rows & 15, rows >> 4], 3).flatten(2, 3)
    return rows.flatten(1).float()


def _spread(parts: torch.Tensor, size: int) -> torch.Tensor:
    """`[blocks, n, 16]` to `[rows, n * size]` in fp32."""
    return _deinterleave(parts).float().repeat_interleave(size, 1)


def _unpack_floats(packed: Packed) -> torch.Tensor:
    matrix = _deinterleave(packed.quants)
    return (matrix.flatten(1) if packed.format == "bf16" else matrix).float()


def _unpack_grouped(packed: Packed) -> torch.Tensor:
    assert packed.scales is not None
    codes = _codes(packed) - {"q8": 128, "q4": 8, "q4_min": 0}[packed.format]
    scales = _spread(packed.scales, packed.group)[:, : codes.shape[1]]
    values = codes[:, : scales.shape[1]] * scales
    return values if packed.mins is None else values + _spread(packed.mins, packed.group)[:, : codes.shape[1]]


def _unpack_q4_k(packed: Packed) -> torch.Tensor:
    assert packed.scales is not None and packed.mins is not None and packed.supers is not None
    scale = _spread(packed.supers[:, :, 0], SUPER) * _spread(packed.scales, GROUP)
    return _codes(packed) * scale - _spread(packed.supers[:, :, 1], SUPER) * _spread(packed.mins, GROUP)


def _unpack_q6_k(packed: Packed) -> torch.Tensor:
    assert packed.high is not None and packed.scales is not None and packed.supers is not None
    high = _deinterleave(packed.high.flatten(1, 2)).unflatten(1, packed.high.shape[1:3])
    upper = torch.stack([high >> 2 * place & 3 for place in range(4)], 3).flatten(1).float()
    codes = _codes(packed) + 16 * upper - 32
    return codes * (_spread(packed.supers, SUPER) * _spread(packed.scales, 16))


def _unpack_ternary(packed: Packed) -> torch.Tensor:
    whole, scales = packed.whole()
    return whole * scales[:, None]


_UNPACK: dict[str, Callable[[Packed], torch.Tensor]] = {
    "q8": _unpack_grouped,
    "q4": _unpack_grouped,
    "q4_min": _unpack_grouped,
    "q4_k": _unpack_q4_k,
    "q6_k": _unpack_q6_k,
    TERNARY: _unpack_ternary,
    TERNARY_2_4: _unpack_ternary,
}


def unpack(packed: Packed) -> torch.Tensor:
    """`packed.unpack()` by the native kernel where there is one."""
    if native.library() is None or packed.quants.device.type != "cpu":
        return packed.unpack()
    out = torch.empty(packed.rows, packed.columns, dtype=torch.float32, device="cpu")
    native.call("unpack", packed.matrix(), ctypes.c_void_p(out.data_ptr()))
    return out


def multiply(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None, planes: int = 2) -> torch.Tensor:
    """`x @ W.T + bias` for `x` `[..., columns]`, in the dtype of `x`.

    Native, integer formats round `x` to `planes` bytes with one scale for 32: 16 bits by default, which changes next to
    nothing. Elsewhere the matrix is unpacked. Ternary formats round `x` everywhere, to one byte with a scale for each
    vector, and give the same bits everywhere.

    Raises:
        ValueError: `x` has another last dimension.
    """
    if x.shape[-1] != packed.columns:
        raise ValueError(f"x {tuple(x.shape)}: expected [..., {packed.columns}].")
    if native.library() is None or x.device.type != "cpu":
        native.say_reference("packed product", x)
        if packed.format in PER_CODE:
            whole, scales = packed.whole()
            return ternary.product(x, whole.float(), scales, bias)
        return F.linear(x, packed.unpack().to(x.dtype), None if bias is None else bias.to(x.dtype))
    values = F.pad(x.detach().float(), (0, -packed.columns % GROUP)).reshape(-1, -(-packed.columns // GROUP) * GROUP)
    values = values.contiguous()
    out = torch.empty(len(values), packed.rows, dtype=torch.float32, device="cpu")
    kept = None if bias is None else F.pad(bias.detach().float(), (0, -packed.rows % BLOCK)).contiguous()
    numbers = (ctypes.c_int64(len(values)), ctypes.c_int64(planes))
    arguments: tuple[Any, ...] = (ctypes.c_void_p(values.data_ptr()), *numbers)
    if len(values):
        native.call("multiply", packed.matrix(kept), *arguments, ctypes.c_void_p(out.data_ptr()))
    return out.reshape(*x.shape[:-1], packed.rows).to(x.dtype)
