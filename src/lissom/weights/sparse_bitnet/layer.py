"""Linear layers that are trained as the sparse ternary ones that they will be."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lissom.errors import UserError
from lissom.kernels.ternary import quantize_tokens, whole_product
from lissom.weights.sparse_bitnet.config import SparseBitNetConfig
from lissom.weights.sparse_bitnet.ternary import nm_mask, sparse_ternary


class _Product(torch.autograd.Function):
    """Whole numbers times whole numbers; both gradients go straight through the rounding and the mask (the dual
    straight-through estimator). The backward pass keeps a byte for each weight and activation; under autocast its
    products are of 16 bits, as the forward pass's are, which hold whole numbers up to 127 exactly."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        whole: torch.Tensor,
        scales: torch.Tensor,
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        quants, inverse = quantize_tokens(x)
        ctx.save_for_backward(quants.to(torch.int8), inverse, whole.to(torch.int8), scales, kept)
        device = x.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.dtypes = x.dtype, weight.dtype, narrow
        return whole_product(quants, inverse, whole, scales)  # in fp32 what packed layers give, bit for bit

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        quants, inverse, whole, scales, kept = ctx.saved_tensors
        gradient, (x_dtype, dtype, narrow) = gradients[0], ctx.dtypes
        in_product = narrow or gradient.dtype
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = ((gradient * scales).to(in_product) @ whole.to(in_product)).to(x_dtype)
        if ctx.needs_input_grad[1]:
            rows = (gradient / inverse).to(in_product).flatten(0, -2)
            of_weight = (rows.T @ quants.to(in_product).flatten(0, -2)).to(dtype)
            of_weight = of_weight if kept is None else of_weight * kept
        return of_x, of_weight, None, None, None


class _Masked(torch.autograd.Function):
    """The weight where the mask is; the gradient is that of the whole weight, or where `dense` is false of what is
    left."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, mask: torch.Tensor, dense: bool) -> torch.Tensor:
        ctx.save_for_backward(None if dense else mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (mask,) = ctx.saved_tensors
        return gradients[0] if mask is None else gradients[0] * mask, None, None


class SparseTernary(nn.Module):
    """What the two layers below share.

    Attributes:
        settings: the method's.
        parts: rows of each logical matrix, which has a scale of its own: a fused layer has several.
        sparse: whether the mask is on. Dense-to-sparse training turns it off for its first steps.
    """

    settings: SparseBitNetConfig
    parts: tuple[int, ...]
    sparse: bool
    bias: torch.Tensor | None

    def matrix(self) -> torch.Tensor:
        """The master weights `[out_features, in_features]`."""
        raise NotImplementedError

    def masters(self) -> torch.Tensor:
        """The same, fp32, whole where they are spread over processes, without gradient."""
        weight = self.matrix().detach()
        return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).float()

    @torch.no_grad()
    def frozen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the master weights stand for now.

        Returns:
            -1, 0 and 1, fp32 `[out_features, in_features]`; the mask of the same shape; the scales, fp32: one number,
            or where the layer has several logical matrices one for each row.
        """
        n, m = (self.settings.n, self.settings.m) if self.sparse else (1, 1)
        found = [
            sparse_ternary(part, n, m, self.settings.mask_from, self.settings.scale_from)
            for part in self.masters().split(self.parts)
        ]
        if len(found) == 1:
            return found[0]
        whole, masks, scales = zip(*found, strict=True)
        rows = torch.tensor(self.parts, device=whole[0].device)
        return torch.cat(whole), torch.cat(masks), torch.stack(scales).repeat_interleave(rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`, in the dtype of `x`."""
        weight, dense = self.matrix(), self.settings.gradient == "dense"
        if weight.dtype != torch.float32 and self.training and torch.is_grad_enabled():
            raise UserError(
                f"Master weights are {str(weight.dtype).removeprefix('torch.')}, where most updates round to nothing: "
                "leave them fp32 and train under autocast (`precision='bf16'`)."
            )
        if self.settings.quantize:
            whole, mask, scales = self.frozen()
            product = _Product.apply(x, weight, whole, scales, None if dense else mask)
            return (product if self.bias is None else product + self.bias.float()).to(x.dtype)
        if self.sparse:
            weight = _Masked.apply(weight, nm_mask(weight, self.settings.n, self.settings.m), dense)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class SparseTernaryLinear(SparseTernary, nn.Linear):
    """`nn.Linear` with fp32 master weights under their usual name."""

    def matrix(self) -> torch.Tensor:
        return self.weight


class SparseTernaryConv1D(SparseTernary, Conv1D):
    """GPT-2's linear layer, whose weight lies the other way."""

    def matrix(self) -> torch.Tensor:
        return self.weight.T


_PLAIN: dict[type[nn.Module], type[SparseTernary]] = {nn.Linear: SparseTernaryLinear, Conv1D: SparseTernaryConv1D}


def trainable(module: nn.Module, settings: SparseBitNetConfig, parts: tuple[int, ...]) -> SparseTernary:
    """The layer that takes the place of a plain linear layer. It has the same parameters and hooks."""
    layer = _PLAIN[type(module)].__new__(_PLAIN[type(module)])
    layer.__dict__.update(module.__dict__)
    layer.settings, layer.parts, layer.sparse = settings, parts, True
    return layer


def plain(layer: SparseTernary) -> nn.Module:
    """The plain linear layer with the same parameters and hooks."""
    kind: Any = next(plain for plain, own in _PLAIN.items() if type(layer) is own)
    module: nn.Module = kind.__new__(kind)
    module.__dict__.update(layer.__dict__)
    return module
