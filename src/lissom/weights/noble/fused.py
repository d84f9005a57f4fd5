"""The pass through a linear layer and its branch that keeps little for its gradients."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lissom.weights.noble.activation import backward, forward

_FEW = 64  # rows: below, a copy of the weight is as much work as the product
_NARROW = 16  # columns; see `_into_few`


def of_zero(down: torch.Tensor, down_bias: torch.Tensor | None) -> torch.Tensor:
    """`[1, rank]`: what W_down makes of an input of 0."""
    return down.new_zeros(1, down.shape[0]) if down_bias is None else down_bias[None]


class BranchedPass(torch.autograd.Function):
    """The layer with its branch, for `[tokens, in_features]`. `[W | W_down]` is one product; what is kept is the input
    and what W_down makes of it, and the backward pass computes the activation again.

    Under autocast products are of its dtype, and phases fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        up: torch.Tensor,
        kind: str,
        subtracts: bool,
        names: tuple[str, ...],
        *inner: torch.Tensor,
    ) -> torch.Tensor:
        device, dtype, rows = x.device.type, weight.dtype, x
        autocasts = torch.amp.is_autocast_available(device)
        if autocasts and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            rows = x.to(dtype)
        with torch.autocast(device, enabled=False) if autocasts else nullcontext():
            main, h = _products(rows, weight, bias, down, down_bias, dtype)
            if subtracts:
                h = torch.cat([h, of_zero(down, down_bias).to(dtype)])
            inside = forward(kind, h, dict(zip(names, inner, strict=True)))
            if subtracts:
                inside = inside[:-1] - inside[-1]
            y = torch.addmm(main, inside, up.to(dtype).T)
        ctx.save_for_backward(rows, h, weight, down, up, *inner)
        ctx.settings = kind, subtracts, names, x.dtype, bias, down_bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        rows, h, weight, down, up, *inner = ctx.saved_tensors
        kind, subtracts, names, x_dtype, bias, down_bias = ctx.settings
        dtype = rows.dtype
        with torch.autocast(rows.device.type, enabled=False):
            of_y = gradients[0].to(dtype)
            of_inside = _into_few(of_y, up.to(dtype))
            if subtracts:
                of_inside = torch.cat([of_inside, -of_inside.sum(0, keepdim=True)])
            inside, of_h, found = backward(kind, h, of_inside, dict(zip(names, inner, strict=True)))
            of_down_bias = None if down_bias is None else of_h.sum(0).to(down_bias.dtype)
            if subtracts:
                inside, of_h = inside[:-1] - inside[-1], of_h[:-1]
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = (of_y @ weight.to(dtype)).addmm_(of_h, down.to(dtype)).to(x_dtype)
            of_weight = (of_y.T @ rows).to(weight.dtype) if ctx.needs_input_grad[1] else None
            of_bias = None if bias is None else of_y.sum(0).to(bias.dtype)
            of_down, of_up = (of_h.T @ rows).to(down.dtype), _into_few(of_y.T, inside).to(up.dtype)
        others = (found[name].to(tensor.dtype) for name, tensor in zip(names, inner, strict=True))
        return of_x, of_weight, of_bias, of_down, of_down_bias, of_up, None, None, None, *others


def _into_few(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, where `right` has few columns. On a CPU such a product takes several times as long as the same one
    turned over, which has few rows."""
    turned = right.shape[1] <= _NARROW and left.device.type == "cpu"
    return (right.T @ left.T).T if turned else left @ right


def _products(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W + b `[tokens, out_features]`, and x W_down + b_d `[tokens, rank]`."""
    if rows.shape[0] < _FEW:
        narrow = [None if part is None else part.to(dtype) for part in (weight, bias, down, down_bias)]
        return F.linear(rows, narrow[0], narrow[1]), F.linear(rows, narrow[2], narrow[3])
    both = torch.cat([weight.to(dtype), down.to(dtype)])
    biases = None
    if bias is not None or down_bias is not None:
        parts = (weight.new_zeros(weight.shape[0]) if bias is None else bias, of_zero(down, down_bias)[0])
        biases = torch.cat(parts).to(dtype)
    out = F.linear(rows, both, biases)
    return out[:, : weight.shape[0]], out[:, weight.shape[0] :].contiguous()
