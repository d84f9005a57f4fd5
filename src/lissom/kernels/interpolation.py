"""Two functions of a log probability that are looked up in one table: native on CPUs, otherwise PyTorch's operations.

Nodes are equally far apart in `sqrt(-log p)`, so that they are dense where p is near 1 and still reach far: there
functions such as the bounds of a trust region bend most.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lissom.kernels import native


class _Interpolation(ctypes.Structure):
    """Mirror of `struct Interpolation` in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("log", "rows", "first", "second")),
        *((name, ctypes.c_int64) for name in ("count", "intervals")),
        *((name, ctypes.c_float) for name in ("scale", "ceiling", "first_most", "second_least", "second_most")),
    )


native.mirror(10, _Interpolation)
Limits = tuple[float, float, float]


def rows_of(first: Tensor, second: Tensor) -> Tensor:
    """The table of two functions by their values at the nodes, `[nodes]`: fp32 `[nodes - 1, 4]`, of each interval both
    values where it begins, and by what they change."""
    values = torch.stack([first, second], 1).double()
    return torch.cat([values[:-1], values.diff(dim=0)], 1).float().contiguous()


def interpolate(log: Tensor, rows: Tensor, end: float, limits: Limits) -> tuple[Tensor, Tensor]:
    """Both functions at `log`, fp32 of its shape; beyond the ends, and for NaN, they stay what they are there.

    Args:
        log: log probabilities, of any shape and floating dtype.
        rows: of `rows_of`, on the same device.
        end: of the table in `sqrt(-log p)`.
        limits: the most that the first function may be, the least and the most that the second may.
    """
    flat = log.detach().float().contiguous()
    if flat.device.type == "cpu" and native.library() is not None and not torch.compiler.is_compiling():
        return _native(flat, rows, end, limits)
    return reference(flat, rows, end, limits)


def reference(log: Tensor, rows: Tensor, end: float, limits: Limits) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch; `log` is fp32."""
    intervals = len(rows)
    place = (-log).nan_to_num(nan=0.0).clamp(0, end * end).sqrt() * (intervals / end)
    interval = place.long().clamp(max=intervals - 1)
    part, found = place - interval, rows[interval]
    first, second = found[..., 0] + part * found[..., 2], found[..., 1] + part * found[..., 3]
    return first.clamp(max=limits[0]), second.clamp(*limits[1:])


def _native(log: Tensor, rows: Tensor, end: float, limits: Limits) -> tuple[Tensor, Tensor]:
    both = torch.empty(
        (2, *log.shape)
    )  # at once: two large pieces of memory are given back and cleared again each time
    first, second = both
    native.call(
        "interpolate",
        _Interpolation(
            log.data_ptr(), rows.data_ptr(), first.data_ptr(), second.data_ptr(), log.numel(), len(rows),
            len(rows) / end, end * end, *limits,
        ),
    )  # fmt: skip
    return first, second
