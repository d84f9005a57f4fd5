"""A linear layer with a branch beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lissom.weights.noble.activation import Tensors, forward, shapes
from lissom.weights.noble.config import NobleConfig
from lissom.weights.noble.fused import BranchedPass, of_zero
from lissom.weights.noble.preset import draw, draw_main, generator, learning_rate_factors


class Branch(nn.Module):
    """The tensors of one branch, in the order in which `shapes` names them.

    Attributes:
        name: of the linear layer in the model, which its random numbers depend on.
        down: `[rank, in_features]`; down_bias: `[rank]` or None; up: `[out_features, rank]`.
        omega_0, phi_0, mix_0 ...: of the activation; see `lissom.weights.noble.activation.shapes`.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(
        self, in_features: int, out_features: int, settings: NobleConfig, name: str, like: torch.Tensor
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.settings, self.name = in_features, out_features, settings, name
        self.rank = rank = settings.rank_of(in_features, out_features)
        biases = settings.source.biases
        self.inner = tuple(name for name, _ in shapes(settings.activation, rank, biases))
        sizes = {"down": (rank, in_features), **({"down_bias": (rank,)} if biases else {}), "up": (out_features, rank)}
        for own, shape in (sizes | dict(shapes(settings.activation, rank, biases))).items():
            dtype = torch.float32 if _is_wave(own) else like.dtype
            parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=like.device))
            parameter.keeps_fp32 = _is_wave(own)
            self.register_parameter(own, parameter)

    @torch.no_grad()
    def initialise(self, only_missing: bool = False) -> None:
        """Draw every tensor, or those that no checkpoint has filled. transformers leaves them alone from then on."""
        for own, parameter in self.named_parameters():
            if not (only_missing and getattr(parameter, "_is_hf_initialized", False)):
                parameter.copy_(self.initial(own))
                parameter._is_hf_initialized = True

    def initial(self, own: str) -> torch.Tensor:
        """How the tensor `own` began, fp32."""
        scale = 1 / math.sqrt(self.in_features) if own == "down" else self.settings.up_scale / math.sqrt(self.rank)
        random = generator(self.settings.seed, f"{self.name}.{own}")
        return draw(kind_of(own), tuple(getattr(self, own).shape), scale, self.settings.source, random)

    def factors(self) -> dict[str, float]:
        """What the base learning rate is multiplied by, for each tensor by name."""
        by_kind = learning_rate_factors(
            self.in_features, self.out_features, self.rank, self.settings.source, self.settings.two_sided
        )
        return {own: by_kind.get(kind_of(own), 1.0) for own, _ in self.named_parameters()}

    def tensors(self) -> Tensors:
        """Those of the activation."""
        return {own: getattr(self, own) for own in self.inner}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Branch:
        """Frequencies and phases keep fp32 where the rest of the model goes to 16 bits."""
        waves = [getattr(self, own) for own in self.inner if _is_wave(own)]
        kept = [*waves, *(wave.grad for wave in waves)]

        def widest(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            narrowed = applied.dtype.itemsize < tensor.dtype.itemsize and any(tensor is own for own in kept)
            return tensor.to(applied.device) if narrowed else applied

        super()._apply(widest, recurse)
        return self

    def extra_repr(self) -> str:
        """See `nn.Module`."""
        return f"rank={self.rank}, activation={self.settings.activation}"


def kind_of(own: str) -> str:
    """`mix_0` is a `mix`."""
    head, _, number = own.rpartition("_")
    return head if number.isdigit() else own


def _is_wave(own: str) -> bool:
    return kind_of(own) in ("omega", "phi")


class Branched:
    """What the two layers below share: a plain linear layer with `noble` beside it.

    Attributes:
        noble: the branch.
        fused: False computes it operation by operation, which is what the fast pass is measured and tested against.
    """

    noble: Branch
    bias: torch.Tensor | None
    fused: bool

    def matrix(self) -> torch.Tensor:
        """The main weight `[out_features, in_features]`."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        branch = self.noble
        if not self.fused or torch.compiler.is_exporting():
            return F.linear(x, self.matrix(), self.bias) + self.branch(x)
        down_bias = getattr(branch, "down_bias", None)
        y: torch.Tensor = BranchedPass.apply(
            x.reshape(-1, x.shape[-1]), self.matrix(), self.bias, branch.down, down_bias, branch.up,
            branch.settings.activation, branch.settings.subtracts, branch.inner, *branch.tensors().values(),
        )  # fmt: skip
        return y.view(*x.shape[:-1], branch.out_features)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """What the branch alone adds, by plain operations."""
        branch, settings = self.noble, self.noble.settings
        down_bias, tensors = getattr(branch, "down_bias", None), branch.tensors()
        rows = F.linear(x, branch.down, down_bias).reshape(-1, branch.rank)
        inside = forward(settings.activation, rows, tensors, False)
        if settings.subtracts:
            inside = inside - forward(settings.activation, of_zero(branch.down, down_bias), tensors, False)
        return F.linear(inside, branch.up).view(*x.shape[:-1], branch.out_features)


class BranchedLinear(Branched, nn.Linear):
    """`nn.Linear` with a branch; its own weight and bias have their usual names."""

    def matrix(self) -> torch.Tensor:
        return self.weight


class BranchedConv1D(Branched, Conv1D):
    """GPT-2's linear layer, whose weight lies the other way, with a branch."""

    def matrix(self) -> torch.Tensor:
        return self.weight.T


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: BranchedLinear, Conv1D: BranchedConv1D}


def branched(module: nn.Module, settings: NobleConfig, name: str) -> nn.Module:
    """The layer that takes the place of the plain linear layer `name`, with its parameters and hooks; the branch is not
    filled yet."""
    kind: Any = _PLAIN[type(module)]
    layer = kind.__new__(kind)
    layer.__dict__.update({key: value.copy() if key == "_modules" else value for key, value in vars(module).items()})
    weight: torch.Tensor = layer.weight
    out_features, in_features = layer.matrix().shape
    layer.noble, layer.fused = Branch(in_features, out_features, settings, name, weight), True
    return layer


def plain(layer: nn.Module) -> nn.Module:
    """The plain linear layer with the same weight, bias and hooks."""
    kind: Any = next(plain for plain, own in _PLAIN.items() if isinstance(layer, own))
    module: nn.Module = kind.__new__(kind)
    module.__dict__.update({key: value for key, value in vars(layer).items() if key != "fused"})
    module._modules = {key: value for key, value in layer._modules.items() if key != "noble"}
    return module


@torch.no_grad()
def initialise(layer: Any) -> None:
    """Fill the branch, and in mode `scratch` draw the main weight again, half as large, with a bias of 0."""
    layer.noble.initialise()
    settings = layer.noble.settings
    if settings.mode == "scratch":
        random = generator(settings.seed, f"{layer.noble.name}.weight")
        layer.weight.copy_(draw_main(tuple(layer.weight.shape), layer.noble.in_features, random))
        layer.weight._is_hf_initialized = True
        if layer.bias is not None:
            layer.bias.zero_()
            layer.bias._is_hf_initialized = True
