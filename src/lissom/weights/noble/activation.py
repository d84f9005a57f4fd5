"""What happens between W_down and W_up: functions of each channel, with matrices between them.

`forward` and `backward` are pure functions of the tensors. The backward pass takes nothing from the forward one but
what went into it, so a layer keeps `rank` numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from lissom.kernels.cosnet import cosnet, cosnet_backward, has_kernel

Kind = Literal["cosnet", "identity", "gelu-net", "silu-net", "tanh-net", "cosine", "three-cosine"]
KINDS: tuple[str, ...] = get_args(Kind)
_WAVES = {"cosine": 1, "cosnet": 2, "three-cosine": 3}
_COSNET = ("omega_0", "phi_0", "mix_0", "mix_bias_0", "omega_1", "phi_1")  # as its kernels take them
_aten = torch.ops.aten


@dataclass(frozen=True)
class _Function:
    value: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of (gradient, argument)


_FUNCTIONS = {
    "gelu-net": _Function(F.gelu, lambda gradient, x: _aten.gelu_backward(gradient, x)),
    "silu-net": _Function(F.silu, lambda gradient, x: _aten.silu_backward(gradient, x)),
    "tanh-net": _Function(torch.tanh, lambda gradient, x: gradient * (1 - torch.tanh(x).square())),
}


def shapes(kind: str, rank: int, biases: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of an activation, in the order in which the functions below take them: for each
    stage `omega` and `phi` if it is a cosine, and after each but the last `mix` and `mix_bias`."""
    stages = 0 if kind == "identity" else _WAVES.get(kind, 2)
    for stage in range(stages):
        if kind in _WAVES:
            yield f"omega_{stage}", (rank,)
            yield f"phi_{stage}", (rank,)
        if stage + 1 < stages:
            yield f"mix_{stage}", (rank, rank)
            if biases:
                yield f"mix_bias_{stage}", (rank,)


Tensors = dict[str, torch.Tensor]


def forward(kind: str, h: torch.Tensor, tensors: Tensors, fused: bool = True) -> torch.Tensor:
    """`[tokens, rank]` to `[tokens, rank]`, in the dtype of `h`. Phases are computed in fp32: near 4 the numbers of
    bf16 are 0.03 apart.

    Args:
        fused: whether a kernel may be used, whose gradients are those of `backward` alone.
    """
    if fused and kind == "cosnet" and has_kernel(h):
        return cosnet(h, *_of_cosnet(tensors))
    return _stages(kind, h, tensors)[-1].to(h.dtype)


def backward(
    kind: str, h: torch.Tensor, gradient: torch.Tensor, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """What `forward` gave, computed again, the gradient of `h`, and those of the tensors.

    Args:
        gradient: `[tokens, rank]`, of what `forward` gives.
    """
    if kind == "cosnet" and has_kernel(h):
        value, of_h, *others = cosnet_backward(h, gradient, *_of_cosnet(tensors))
        return value, of_h, {name: own for name, own in zip(_COSNET, others, strict=True) if name in tensors}
    if kind == "identity":
        return h, gradient, {}
    values = _stages(kind, h, tensors)
    flow, found = _wide(gradient), {}
    for stage in reversed(range(len(values) // 2)):
        argument = values[2 * stage]
        if kind in _WAVES:
            omega = tensors[f"omega_{stage}"]
            slope = -torch.sin(omega * argument + tensors[f"phi_{stage}"]) * flow
            found[f"omega_{stage}"], found[f"phi_{stage}"] = (slope * argument).sum(0), slope.sum(0)
            flow = slope * omega
        else:
            flow = _FUNCTIONS[kind].backward(flow, argument)
        if stage:
            mix, before = tensors[f"mix_{stage - 1}"], values[2 * stage - 1]
            narrow = flow.to(h.dtype)
            found[f"mix_{stage - 1}"] = narrow.T @ before.to(h.dtype)
            if f"mix_bias_{stage - 1}" in tensors:
                found[f"mix_bias_{stage - 1}"] = flow.sum(0)
            flow = _wide(narrow @ mix.to(h.dtype))
    return values[-1].to(h.dtype), flow.to(h.dtype), found


def _stages(kind: str, h: torch.Tensor, tensors: Tensors) -> list[torch.Tensor]:
    """Argument and value of each stage in turn, fp32."""
    if kind == "identity":
        return [h]
    found = [_wide(h)]
    for stage in range(_WAVES.get(kind, 2)):
        if stage:
            mixed = _wide(found[-1].to(h.dtype) @ tensors[f"mix_{stage - 1}"].to(h.dtype).T)
            bias = tensors.get(f"mix_bias_{stage - 1}")
            found.append(mixed if bias is None else mixed + bias)
        x = found[-1]
        if kind in _WAVES:
            found.append(torch.cos(tensors[f"omega_{stage}"] * x + tensors[f"phi_{stage}"]))
        else:
            found.append(_FUNCTIONS[kind].value(x))
    return found


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _of_cosnet(tensors: Tensors) -> tuple[torch.Tensor | None, ...]:
    return tuple(tensors.get(name) for name in _COSNET)
