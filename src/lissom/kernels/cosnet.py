"""cos(omega_1 (cos(omega_0 h + phi_0) mix^T + mix_bias) + phi_1) in one pass over the tokens, and its gradients in
another that computes everything in between again: native on CPUs in fp32, Triton on a GPU.

The reference, operation by operation, is `lissom.weights.noble.activation`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec

import torch

from lissom.kernels import native

Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]
_CHUNK = 512  # tokens whose sums are kept apart: the unit of work of a thread of the CPU
_MOST = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}  # channels that fit into a GPU's shared memory


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


def has_kernel(h: torch.Tensor) -> bool:
    """Whether there is a kernel for such a tensor. A graph that is compiled has PyTorch's operations, which the
    compiler fuses itself."""
    if torch.compiler.is_compiling():
        return False
    if h.device.type == "cuda":
        return h.shape[1] <= _MOST.get(h.dtype, 0) and _has_triton()
    return h.device.type == "cpu" and h.dtype == torch.float32 and native.library() is not None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def cosnet(
    h: torch.Tensor,
    omega_0: torch.Tensor,
    phi_0: torch.Tensor,
    mix: torch.Tensor,
    mix_bias: torch.Tensor | None,
    omega_1: torch.Tensor,
    phi_1: torch.Tensor,
) -> torch.Tensor:
    """`h` and what is returned are `[tokens, rank]` (see `has_kernel`); `mix` is `[rank, rank]`, others are `[rank]`.
    It has no gradient of its own: see `cosnet_backward`."""
    h, parameters = h.contiguous(), _ready(omega_0, phi_0, omega_1, phi_1, mix, mix_bias)
    if h.device.type == "cuda":
        from lissom.kernels import cosnet_triton

        return cosnet_triton.forward(h, parameters)
    value = torch.empty(h.shape)
    _run(h, None, parameters, value, None, None)
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
    h, gradient = h.contiguous(), gradient.contiguous()
    parameters = _ready(omega_0, phi_0, omega_1, phi_1, mix, mix_bias)
    if h.device.type == "cuda":
        from lissom.kernels import cosnet_triton

        value, of_h, vectors, of_mix = cosnet_triton.backward(h, gradient, parameters)
    else:
        tokens, rank = h.shape
        value, of_h = torch.empty(h.shape), torch.empty(h.shape)
        sums = torch.empty(-(-tokens // _CHUNK), rank * (rank + 5))
        _run(h, gradient, parameters, value, of_h, sums)
        whole = sums.sum(0)
        vectors, of_mix = whole[: 5 * rank].view(5, rank), whole[5 * rank :].view(rank, rank)
    of_omega_0, of_phi_0, of_omega_1, of_phi_1, of_bias = vectors.unbind()
    return value, of_h, of_omega_0, of_phi_0, of_mix, of_bias, of_omega_1, of_phi_1


def _ready(*parameters: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if part is None else part.detach().float().contiguous() for part in parameters)


def _run(
    h: torch.Tensor,
    gradient: torch.Tensor | None,
    parameters: tuple[torch.Tensor | None, ...],
    value: torch.Tensor,
    of_h: torch.Tensor | None,
    sums: torch.Tensor | None,
) -> None:
    places = (None if part is None else part.data_ptr() for part in (h, gradient, *parameters, value, of_h, sums))
    native.call("cosnet", _CosNet(*places, *h.shape, _CHUNK))
