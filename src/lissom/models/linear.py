"""The linear layers of a decoder: finding them, reading their weights, and the logical matrices that they hold."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lissom.errors import UserError
from lissom.kernels.packed_layers import PackedLinear
from lissom.models.decoder import decoder_layers, describe_decoder

KINDS: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)  # the latter is GPT-2's, whose weight lies the other way


def linear_layers(model: PreTrainedModel) -> list[dict[str, nn.Module]]:
    """The linear layers of each decoder layer, by their names in the model; none that a subclass computes otherwise.

    Raises:
        UserError: most weights of a layer are in something else (fused experts).
    """
    prefix, layers = decoder_layers(model)
    found = []
    for number, layer in enumerate(layers):
        inside = {
            f"{prefix}.{number}.{name}": module for name, module in layer.named_modules() if type(module) in KINDS
        }
        weights = sum(module.weight.numel() for module in inside.values())
        if 2 * weights < sum(parameter.numel() for parameter in layer.parameters()):
            raise UserError(
                f"Most weights of {type(model).__name__} are in no linear layers, which are what is changed."
            )
        found.append(inside)
    return found


def weight_of(module: nn.Module) -> torch.Tensor:
    """The matrix of a linear layer, `[out_features, in_features]`; of an embedding `[rows, columns]`."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def logical_rows(model: PreTrainedModel, name: str, rows: int) -> tuple[int, ...]:
    """Rows of the logical matrices that the linear layer `name` of `rows` outputs holds: query, key and value, or gate
    and up, may be fused."""
    info, kind = describe_decoder(model), name.rpartition(".")[2]
    queries, keys = info.num_attention_heads * info.head_dim, info.num_key_value_heads * info.head_dim
    if kind in ("qkv_proj", "c_attn") and rows == queries + 2 * keys:
        return queries, keys, keys
    if kind == "gate_up_proj" and rows % 2 == 0:
        return rows // 2, rows // 2
    return (rows,)


def require_original(model: PreTrainedModel) -> None:
    """Raise a `UserError` where the weights of `model` are quantised, or layers of another method are in it."""
    method = getattr(getattr(model.config, "quantization_config", None), "method", None)
    if method:
        raise UserError(f"The model has the layers of {method} in it: start from a plain one.")
    if getattr(model, "is_quantized", False) or any(isinstance(m, PackedLinear) for m in model.modules()):
        raise UserError("The model is quantised already: start from its original weights.")
