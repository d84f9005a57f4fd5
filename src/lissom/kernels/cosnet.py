"""cos(omega_1 (cos(omega_0 h + phi_0) mix^T + mix_bias) + phi_1) in one pass over the tokens, and its gradients in
another that computes everything in between again: native, on CPUs in fp32.

What else there is computes the same operation by operation: `lissom.weights.noble.activation`.
"""

from __future__ import annotations

import ctypes

import torch

from lissom.kernels import native

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]
_CHUNK = 512  # tokens whose sums are kept apart: the unit of work of a thread


class _CosNet(ctypes.Structure):
    """Mirror of `struct CosNet` in csrc/kernels.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("h", "gradient", "omega_0", "phi_0", "omega_1", "phi_1", "mix", "mix_bias", "value", "of_h")
        ),
        ("sums", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "rank", "chunk")),
    )


native.mirror(9, _CosNet)


def has_native(h: torch.Tensor) -> bool:
    """Whether there is a kernel for such a tensor. A graph that is compiled has PyTorch's operations, which the
    compiler fuses itself."""
    return (
        not torch.compiler.is_compiling()
        and h.device.type == "cpu"
        and h.dtype == torch.float32
        and native.library() is not None
    )


def cosnet(
    h: torch.Tensor,
    omega_0: torch.Tensor,
    phi_0: torch.Tensor,
    mix: torch.Tensor,
    mix_bias: torch.Tensor | None,
    omega_1: torch.Tensor,
    phi_1: torch.Tensor,
) -> torch.Tensor:
    """`h` and what is returned are `[tokens, rank]`, fp32 (see `has_native`); `mix` is `[rank, rank]`, others `[rank]`.
    It has no gradient of its own: see `cosnet_backward`."""
    h, value = h.contiguous(), torch.empty(h.shape)
    _run(h, None, (omega_0, phi_0, omega_1, phi_1, mix, mix_bias), value, None, None)
    return value


def cosnet_backward(
    h: torch.Tensor,
    gradient: torch.Tensor,
    omega_0: torch.Tensor,
    phi_0: torch.Tensor,
    mix: torch.Tensor,
    mix_bias: torch.Tensor | None,
    omega_1: torch.Tensor,
    phi_1: torch.Tensor,
) -> Gradients:
    """What `cosnet` gave, and the gradients of `h`, `omega_0`, `phi_0`, `mix`, `mix_bias`, `omega_1` and `phi_1`.

    Args:
        gradient: of what `cosnet` gave, `[tokens, rank]`.
    """
    tokens, rank = h.shape
    h, gradient, value, of_h = h.contiguous(), gradient.contiguous(), torch.empty(h.shape), torch.empty(h.shape)
    sums = torch.empty(-(-tokens // _CHUNK), rank * (rank + 5))
    _run(h, gradient, (omega_0, phi_0, omega_1, phi_1, mix, mix_bias), value, of_h, sums)
    vectors, of_mix = sums.sum(0).split((5 * rank, rank * rank))
    of_omega_0, of_phi_0, of_omega_1, of_phi_1, of_bias = (part.clone() for part in vectors.split(rank))
    return value, of_h, of_omega_0, of_phi_0, of_mix.reshape(rank, rank).clone(), of_bias, of_omega_1, of_phi_1


def _run(
    h: torch.Tensor,
    gradient: torch.Tensor | None,
    parameters: tuple[torch.Tensor | None, ...],
    value: torch.Tensor,
    of_h: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    given = [None if part is None else part.detach().float().contiguous() for part in parameters]
    parts = (h, gradient, *given, value, of_h, sums)
    places = (None if part is None else part.data_ptr() for part in parts)
    native.call("cosnet", _CosNet(*places, *h.shape, _CHUNK))
