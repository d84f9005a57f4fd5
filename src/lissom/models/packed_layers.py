"""Modules whose weights are packed: they take the place of `nn.Linear` and `nn.Embedding`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lissom.kernels import packed as formats
from lissom.kernels.packed import Packed, multiply, unpack


class _Product(torch.autograd.Function):
    """x W^T; the gradient goes to x only, for adapters beside frozen packed weights."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return multiply(x, layer.packed, layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] @ unpack(ctx.layer.packed).to(gradients[0].dtype), None


class _PackedModule(nn.Module):
    """Holds the tensors of a `Packed` as buffers of the same names."""

    def __init__(self, format: str, rows: int, columns: int, group: int, device: Any = None) -> None:
        super().__init__()
        self.format, self.rows, self.columns, self.group = format, rows, columns, group
        for name, (shape, dtype) in formats.shapes(format, rows, columns, group).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    @property
    def packed(self) -> Packed:
        """The matrix, `[out_features, in_features]` or `[num_embeddings, embedding_dim]`."""
        return Packed(self.format, self.rows, self.columns, group=self.group, **dict(self.named_buffers(recurse=False)))

    def hold(self, packed: Packed) -> None:
        """Take the tensors of `packed`, without a copy."""
        for name, tensor in packed.tensors().items():
            setattr(self, name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A model's `.to(dtype)` must not change the type of scales.
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            other = fn(tensor)
            return other if other.dtype == tensor.dtype else tensor.to(other.device)

        super()._apply(fn if not self._buffers else moved, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.columns} -> {self.rows}, {self.format}, group {self.group}"


class PackedLinear(_PackedModule):
    """`nn.Linear` with packed, frozen weights; `bias` is a parameter or None."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: str,
        group: int = formats.GROUP,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(format, out_features, in_features, group, device)
        self.in_features, self.out_features = in_features, out_features
        new = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", new if bias else None)

    @classmethod
    def of(cls, packed: Packed, bias: torch.Tensor | None = None) -> PackedLinear:
        """A layer that holds `packed`, without a copy."""
        layer = cls(packed.columns, packed.rows, packed.format, packed.group, device="meta")
        layer.hold(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`."""
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self)
        return multiply(x, self.packed, self.bias)


class PackedEmbedding(_PackedModule):
    """`nn.Embedding` with packed, frozen weights. `dtype` is that of what it returns, `scale` what that is multiplied
    with."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: str,
        group: int = formats.GROUP,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ) -> None:
        super().__init__(format, num_embeddings, embedding_dim, group, device)
        self.num_embeddings, self.embedding_dim, self.dtype, self.scale = num_embeddings, embedding_dim, dtype, scale

    @classmethod
    def of(cls, packed: Packed, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> PackedEmbedding:
        """An embedding that holds `packed`, without a copy."""
        layer = cls(packed.rows, packed.columns, packed.format, packed.group, device="meta", dtype=dtype, scale=scale)
        layer.hold(packed)
        return layer

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` `[...]` to `[..., embedding_dim]`."""
        rows = unpack(self.packed.select(ids.flatten())).to(self.dtype).view(*ids.shape, self.embedding_dim)
        # The scale is rounded first, as in models that keep it as a tensor of their dtype.
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)
