"""Modules whose weights are packed: they take the place of `nn.Linear` and `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lissom.errors import UserError
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
    """Holds the tensors of a `Packed` as buffers of the same names.

    Attributes:
        shared: the tensors are another module's, which saves them: a tied head.
        stands_for: the module, if any, whose tensors are saved instead; in a tuple, which makes it no part of this one.
    """

    stands_for: tuple[nn.Module, ...] = ()

    def __init__(self, format: str, rows: int, columns: int, group: int, device: Any = None) -> None:
        super().__init__()
        self.format, self.rows, self.columns, self.group = format, rows, columns, group
        for name, (shape, dtype) in formats.shapes(format, rows, columns, group).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))

    @property
    def packed(self) -> Packed:
        """The matrix, `[out_features, in_features]` or `[num_embeddings, embedding_dim]`."""
        return Packed(self.format, self.rows, self.columns, group=self.group, **dict(self.named_buffers(recurse=False)))

    @property
    def shared(self) -> bool:
        return bool(self._non_persistent_buffers_set)

    @shared.setter
    def shared(self, value: bool) -> None:
        self._non_persistent_buffers_set = set(self._buffers) if value else set()

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        save = self.stands_for[0]._save_to_state_dict if self.stands_for else super()._save_to_state_dict
        save(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        what = "spills" if "spills" in self._buffers else "group"
        return f"{self.columns} -> {self.rows}, {self.format}, {what} {self.group}"


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
    """`nn.Embedding` with packed, frozen weights.

    Attributes:
        dtype: of what it returns.
        embed_scale: what rows are multiplied with, as Gemma does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        format: str,
        group: int = formats.GROUP,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        embed_scale: float = 1.0,
    ) -> None:
        super().__init__(format, num_embeddings, embedding_dim, group, device)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.embed_scale = embed_scale

    @classmethod
    def of(cls, packed: Packed, dtype: torch.dtype = torch.float32, embed_scale: float = 1.0) -> PackedEmbedding:
        """An embedding that holds `packed`, without a copy."""
        layer = cls(packed.rows, packed.columns, packed.format, packed.group, "meta", dtype, embed_scale)
        layer.hold(packed)
        return layer

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` `[...]` to `[..., embedding_dim]`.

        Raises:
            UserError: an id is outside the vocabulary (looked for on the CPU only, where it costs nothing).
        """
        if ids.is_cpu and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise UserError(f"A token id is outside the vocabulary of {self.num_embeddings} tokens.")
        rows = unpack(self.packed.select(ids.flatten())).to(self.dtype).view(*ids.shape, self.embedding_dim)
        # The scale is rounded first, as in models that keep it as a tensor of their dtype.
        factor = torch.tensor(self.embed_scale, dtype=self.dtype, device=rows.device)
        return rows if self.embed_scale == 1.0 else rows * factor


def skeleton(module: nn.Module, format: str, group: int, dtype: torch.dtype | None = None) -> _PackedModule | None:
    """The packed layer that can take the place of `module`, without data (on the meta device).

    None where it is no `nn.Linear`, `nn.Embedding` or `Conv1D` of GPT-2, or a subclass that computes something else.
    """
    kind = type(module)
    if kind is nn.Linear:
        bias = module.bias is not None
        return PackedLinear(module.in_features, module.out_features, format, group, bias, "meta", dtype)
    if kind is Conv1D:
        return PackedLinear(module.nx, module.nf, format, group, True, "meta", dtype)
    # Gemma's embeddings are a subclass that multiplies, with the factor in this attribute.
    scale = getattr(module, "scalar_embed_scale", None if kind is not nn.Embedding else 1.0)
    if isinstance(module, nn.Embedding) and scale is not None:
        sizes = module.num_embeddings, module.embedding_dim
        return PackedEmbedding(*sizes, format, group, "meta", dtype or torch.float32, float(scale))
    return None


def replace(model: nn.Module, name: str, packed: Packed, shared: bool = False) -> None:
    """Put the packed layer with `packed` in the place of the module `name`, with its bias and its hooks.

    Args:
        shared: see `_PackedModule`.
    """
    module = model.get_submodule(name)
    layer = skeleton(module, packed.format, packed.group, module.weight.dtype)
    if layer is None or (layer.rows, layer.columns) != (packed.rows, packed.columns):
        raise ValueError(f"{name} is no matrix of {packed.rows} x {packed.columns}.")
    layer.hold(packed)
    layer.shared = shared
    if isinstance(layer, PackedLinear) and layer.bias is not None:
        layer.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    layer.train(module.training)
    layer.__dict__.update({key: hooks for key, hooks in vars(module).items() if "_hooks" in key})
    model.set_submodule(name, layer)


@contextmanager
def exchanged(model: nn.Module, packed: Mapping[str, Packed]) -> Iterator[dict[str, nn.Module]]:
    """Inside the block `model` has these matrices in the place of its own modules, which are returned by name.

    What is saved inside it are the model's own weights: `state_dict` has them under their names.
    """
    own = {name: model.get_submodule(name) for name in packed}
    try:
        for name, matrix in packed.items():
            replace(model, name, matrix)
            model.get_submodule(name).stands_for = (own[name],)
        yield own
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def weight_count(model: nn.Module) -> int:
    """Number of weights, of packed matrices as many as they stand for; shared ones count once."""
    packed = {m.quants.data_ptr(): m.rows * m.columns for m in model.modules() if isinstance(m, _PackedModule)}
    return sum(packed.values()) + sum(parameter.numel() for parameter in model.parameters())
