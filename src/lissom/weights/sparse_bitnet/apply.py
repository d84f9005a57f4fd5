"""Sparse ternary layers in a model: putting them in, watching them, and packing what they have become."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lissom.errors import UserError
from lissom.kernels.packed import Packed, check_finite, pack_ternary
from lissom.kernels.packed_layers import replace
from lissom.kernels.ternary import BLOCK, TERNARY, TERNARY_2_4
from lissom.models.linear import linear_layers, logical_rows, require_original, weight_of
from lissom.plugin import attach
from lissom.training_plugin import mark
from lissom.weights.sparse_bitnet.config import SparseBitNetConfig
from lissom.weights.sparse_bitnet.layer import SparseTernary, plain, trainable
from lissom.weights.sparse_bitnet.ternary import check_pattern, ternary

Frozen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
logger = logging.getLogger(__name__)


def convert(model: PreTrainedModel, settings: SparseBitNetConfig) -> PreTrainedModel:
    """See `SparseBitNetConfig.convert`."""
    if layers_of(model):
        raise UserError("The model has sparse ternary layers already.")
    require_original(model)
    place(model, settings)
    mark(model, settings)
    return model


def place(model: PreTrainedModel, settings: SparseBitNetConfig) -> None:
    """Exchange the decoder's linear layers; nothing is changed where one cannot be."""
    layers = {name: module for inside in linear_layers(model) for name, module in inside.items()}
    narrow = False
    for name, module in layers.items():
        weight = weight_of(module)
        check_pattern(settings.n, settings.m, weight.shape[1], name)
        if weight.is_meta:
            continue
        check_finite(weight, name)
        narrow |= weight.dtype != torch.float32
    if narrow:
        # In 16 bits most updates of a training step round to nothing, and magnitudes are often equal.
        logger.warning("Master weights are made fp32: the model's are of 16 bits.")
    for name, module in layers.items():
        if module.weight.dtype != torch.float32 and not module.weight.is_meta:
            module.weight.data = module.weight.data.float()
        model.set_submodule(name, trainable(module, settings, logical_rows(model, name, weight_of(module).shape[0])))


def layers_of(model: nn.Module) -> dict[str, SparseTernary]:
    """The sparse ternary layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseTernary)}


def set_sparse(model: nn.Module, sparse: bool) -> None:
    """Turn the masks of all layers on or off."""
    for layer in layers_of(model).values():
        layer.sparse = sparse


def packed_of(layer: SparseTernary) -> Packed:
    """What the layer stands for now, packed without loss: patterns that leave at most two of four in the format of 2:4,
    others as ternary."""
    whole, _, scales = layer.frozen()
    n, m = layer.settings.n, layer.settings.m
    two_of_four = layer.sparse and ((n <= 2 and m % 4 == 0) or (n, m) == (1, 2)) and whole.shape[1] % 4 == 0
    return pack_ternary(whole, scales, TERNARY_2_4 if two_of_four else TERNARY)


def check_packable(model: PreTrainedModel) -> None:
    """Raise a `UserError` where the model cannot be packed, whatever its weights are: it has no sparse ternary layers,
    they are the floating point control, or parts of fused ones begin within rows that are stored together."""
    layers = layers_of(model)
    if not layers:
        if getattr(model, "is_quantized", False):
            raise UserError("The model's weights are packed already.")
        raise UserError("The model has no sparse ternary layers: `SparseBitNetConfig(...).convert(model)` makes them.")
    for name, layer in layers.items():
        if not layer.settings.quantize:
            raise UserError("The model is the floating point control (quantize=False): there is nothing to pack.")
        if any(rows % BLOCK for rows in layer.parts[:-1]):
            raise UserError(f"{name} has parts of {layer.parts} rows: all but the last must be a multiple of {BLOCK}.")


def pack(model: PreTrainedModel) -> PreTrainedModel:
    """Replace trained sparse ternary layers by packed ones, in place. Logits stay the same, bit for bit, in fp32.

    `save_pretrained` then writes packed weights, and `from_pretrained` reads them.

    Raises:
        UserError: see `check_packable`; or weights are not finite.
    """
    check_packable(model)
    layers, packed = layers_of(model), {}
    for name, layer in layers.items():
        check_finite(layer.masters(), name)
        packed[name] = packed_of(layer)
    for name, layer in layers.items():
        model.set_submodule(name, plain(layer))
        replace(model, name, packed.pop(name))
    attach(model)
    return model


@dataclass(frozen=True)
class Census:
    """What the weights of a model are at one moment.

    Attributes:
        zeros: share that is zero.
        pruned: share that would be -1 or 1, but for the mask.
        empty: share of the groups of `m` that are all zeros.
    """

    zeros: float
    pruned: float
    empty: float


@torch.no_grad()
def census(model: nn.Module, frozen: Mapping[str, Frozen] | None = None) -> Census:
    """Over all sparse ternary layers.

    Args:
        frozen: what `SparseTernary.frozen` returns of each layer, where it is known.

    Raises:
        UserError: the model has none.
    """
    weights = zeros = pruned = groups = empty = 0
    for name, layer in layers_of(model).items():
        whole, mask, scales = layer.frozen() if frozen is None else frozen[name]
        before = ternary(layer.masters(), scales if scales.ndim == 0 else scales[:, None])
        weights += whole.numel()
        zeros += int((whole == 0).sum())
        pruned += int((before[~mask] != 0).sum())
        inside = whole.unflatten(1, (-1, layer.settings.m)).any(-1)
        groups += inside.numel()
        empty += int((~inside).sum())
    if not weights:
        raise UserError("The model has no sparse ternary layers.")
    return Census(zeros / weights, pruned / weights, empty / groups)
