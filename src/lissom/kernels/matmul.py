"""Products of a few large matrices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Lock

import torch

# The setting is the process's: the first thread to enter a block makes it, the last to leave takes it back.
_lock = Lock()
_blocks, _before = 0, "none"


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for `a` `[heads, m, k]` and `b` `[heads, k, n]`.

    On a CPU one product after the other, each on all threads: the batched product shares the matrices out over the
    threads, and with the few KV heads of a layer some of them stand idle.
    """
    if a.device.type != "cpu":
        return torch.bmm(a, b)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    with _onednn() if a.dtype == torch.float32 and _onednn_is_exact() else nullcontext():
        for left, right, target in zip(a, b, out, strict=True):
            torch.mm(left, right, out=target)
    return out


@contextmanager
def _onednn() -> Iterator[None]:
    """Inside the block oneDNN multiplies fp32 matrices, not MKL, which runs AVX2 code on AMD's CPUs: about half the
    rate. PyTorch offers that choice only as the leave to round to bf16."""
    global _blocks, _before
    setting = torch.backends.mkldnn.matmul
    with _lock:
        if not _blocks:
            _before, setting.fp32_precision = setting.fp32_precision, "bf16"
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                setting.fp32_precision = _before


@cache
def _onednn_is_exact() -> bool:
    """Whether oneDNN does not use that leave on this CPU (with AMX it does)."""
    if not torch.backends.mkldnn.is_available():
        return False
    matrix = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    with _onednn():
        product = matrix @ matrix
    wanted = matrix.double() @ matrix.double()
    return bool((product - wanted).abs().max() < 1e-5 * wanted.abs().max())
