"""The weights of Sparse-BitNet (arXiv 2603.05168): masks, scales and ternary values.

A weight matrix is `[rows, columns]`, output and input features. What it meets, activations that are whole numbers, and
the product of both, is in `lissom.kernels.ternary`.
"""

from __future__ import annotations

from typing import Literal

import torch

from lissom.errors import UserError

MaskFrom = Literal["master", "ternary"]
ScaleFrom = Literal["dense", "masked", "survivors"]

LEAST = 1e-5  # of a scale


def check_pattern(n: int, m: int, columns: int | None = None, name: str = "the matrix") -> None:
    """Raise a `UserError` where n:m is no pattern, or does not divide rows of `columns` inputs."""
    if not 1 <= n <= m:
        raise UserError(f"{n}:{m} sparsity: expected n of m weights with 1 <= n <= m.")
    if columns is not None and columns % m:
        raise UserError(f"{n}:{m} sparsity needs a multiple of {m} inputs; {name} has {columns}.")


def nm_mask(weight: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """True for the `n` largest magnitudes of every `m` consecutive inputs; of equal ones those of lower index.

    Args:
        weight: `[rows, columns]`, columns a multiple of `m`.

    Returns:
        bool `[rows, columns]`, exactly `n` in each group.
    """
    check_pattern(n, m, weight.shape[-1])
    if n == m:
        return torch.ones_like(weight, dtype=torch.bool)
    # Ranks by comparing every two places: a sort of so few numbers takes far longer.
    places = weight.detach().abs().unflatten(-1, (-1, m)).unbind(-1)
    ranks = [torch.zeros_like(places[0], dtype=torch.int8) for _ in places]
    for second in range(m):
        for first in range(second):
            wins = places[first] >= places[second]
            ranks[second] += wins
            ranks[first] += ~wins
    return torch.stack([rank < n for rank in ranks], -1).flatten(-2)


def scale_of(weight: torch.Tensor, mask: torch.Tensor | None = None, scale_from: ScaleFrom = "dense") -> torch.Tensor:
    """The scale of one logical matrix: the mean magnitude of its weights, at least 1e-5.

    Args:
        mask: see `nm_mask`; needed unless `scale_from` is `dense`.
        scale_from: `dense` is the paper's, over all weights. Ablations: `masked` counts those that are left out as
            zeros, `survivors` does not count them.

    Returns:
        fp32 scalar, without gradient.
    """
    magnitudes = weight.detach().float().abs()
    count: int | torch.Tensor = magnitudes.numel()
    if scale_from != "dense" and mask is not None:
        magnitudes = magnitudes * mask
        count = magnitudes.numel() if scale_from == "masked" else mask.sum().clamp(min=1)
    # Summed in double precision, so that the scale does not depend on threads and on how the weight lies in memory.
    return (magnitudes.sum(dtype=torch.float64) / count).float().clamp(min=LEAST)


def ternary(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """-1, 0 or 1: the nearest to `weight / scale`, halves to zero. In the dtype of `weight`, without gradient."""
    return (weight.detach() / scale).round_().clamp_(-1, 1)


def sparse_ternary(
    weight: torch.Tensor, n: int, m: int, mask_from: MaskFrom = "master", scale_from: ScaleFrom = "dense"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ternary weights, mask and scale of one logical matrix.

    Args:
        weight: master weights `[rows, columns]`, fp32.
        mask_from: `master` is the paper's. Ablation: `ternary` ranks the magnitudes of ternary weights, nearly all of
            which are equal, so that the lower index decides.

    Returns:
        -1, 0 and 1 `[rows, columns]`, zero where masked; the mask; the scale.
    """
    mask = nm_mask(weight, n, m)
    scale = scale_of(weight, mask, scale_from)
    if mask_from == "ternary":
        mask = nm_mask(ternary(weight, scale), n, m)
    return ternary(weight, scale).mul_(mask), mask, scale
