"""Products of a few large matrices."""

from __future__ import annotations

import torch


def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b` for `a` `[heads, m, k]` and `b` `[heads, k, n]`, written to `out` where it is given.

    On a CPU one product after the other, each on all threads: the batched product shares the matrices out over the
    threads, and with the few KV heads of a layer some of them stand idle.
    """
    if a.device.type != "cpu":
        return torch.bmm(a, b, out=out)
    if out is None:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for left, right, target in zip(a, b, out, strict=True):
        torch.mm(left, right, out=target)
    return out
