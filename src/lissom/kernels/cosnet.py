"""cos(omega_1 (cos(omega_0 h + phi_0) mix^T + bias) + phi_1) in one pass over the tokens, and its gradients in another
that computes everything in between again."""

from __future__ import annotations

import torch

from lissom.kernels import native

Gradients = tuple[torch.Tensor, ...]


def has_native(h: torch.Tensor) -> bool:
    """Whether there is a kernel for `h`: fp32 on a CPU."""
    return False


def cosnet(*parts: torch.Tensor | None) -> torch.Tensor:
    raise NotImplementedError


def cosnet_backward(*parts: torch.Tensor | None) -> Gradients:
    raise NotImplementedError


_ = native
