"""How strongly a step is pulled to the guide."""

from __future__ import annotations

from typing import Literal

import torch

Level = Literal["vp", "flow"]


def noise_level(a: float, b: float, level: Level) -> float:
    """Of a sample `a x₀ + b ε`, 0 to 1.

    The same sample has two levels, which differ by much: at equal shares the one is 0.71 and the other 0.5. `vp` is
    `b` where `a² + b² = 1` (the paper's experiments on images), `flow` is `b` where `a + b = 1` (its video models).
    """
    return b / (a * a + b * b) ** 0.5 if level == "vp" else b / (a + b)


def weight(level: float, alpha: torch.Tensor) -> torch.Tensor:
    """λ: the noise level to the power of α; 0 where α is infinite, which leaves a region free.

    Args:
        level: 0 to 1.
        alpha: of each entry, from 0, which gives the guide itself.
    """
    return torch.where(alpha.isinf(), torch.zeros_like(alpha), level**alpha)


def pulled(clean: torch.Tensor, guide: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The clean picture that a step is taken from: `(1 − λ) x₀ + λ y`."""
    return clean + weights * (guide - clean)
