"""What a decoder looks like, read from its config, and which layers and weights it has."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from lissom.errors import UserError

_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class DecoderInfo:
    """Sizes of a decoder. `sliding` tells for each layer whether its attention has a window."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    vocab_size: int
    sliding: tuple[bool, ...]


def describe_decoder(model: PreTrainedModel) -> DecoderInfo:
    """Sizes of `model`, whatever its architecture calls them.

    Raises:
        UserError: it has no attention layers as decoders have them, or is no model of transformers.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):  # a wrapper of peft's, say, has one, too
        raise UserError(f"Expected a model of transformers, got {type(model).__name__}.")
    config = model.config.get_text_config(decoder=True)
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        raise UserError(f"{type(model).__name__} has no attention layers with a KV cache, which lissom works on.")
    # As transformers' own cache decides it.
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    return DecoderInfo(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        # A model with relative positions has no limit of its own.
        max_position_embeddings=getattr(config, "max_position_embeddings", None) or _NO_LIMIT,
        vocab_size=config.vocab_size,
        sliding=tuple(kind != "full_attention" for kind in types),
    )


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder's layers.

    Raises:
        UserError: the model has no such list.
    """
    count = describe_decoder(model).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UserError(f"{type(model).__name__} has no list of {count} decoder layers that lissom could find.")


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits that tell one model from another: its sizes, rotations and a sample of every weight in
    bf16.

    The same weights give the same fingerprint in fp32 and in bf16.
    """
    config = model.config.get_text_config(decoder=True)
    # Weights may be read with other rotations or another window than they had.
    settings = [getattr(config, name, None) for name in ("rope_parameters", "sliding_window", "query_pre_attn_scalar")]
    facts = (model.config.model_type, describe_decoder(model), json.dumps(settings, sort_keys=True, default=str))
    digest = hashlib.sha256(repr(facts).encode())
    for name, sample in sorted(_samples(model).items()):
        digest.update(name.encode())
        digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _samples(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Up to 16 values of every weight; of packed ones, of what they stand for, by the name of the dense weight."""
    samples, inside = {}, []
    for name, module in model.named_modules():
        packed = getattr(module, "packed", None)
        if packed is None:
            continue
        places = torch.arange(0, packed.rows * packed.columns, max(1, packed.rows * packed.columns // 16))[:16]
        rows = packed.select(places // packed.columns).unpack()
        samples[f"{name}.weight"] = rows[torch.arange(len(places)), places % packed.columns]
        inside += [f"{name}.{part}" for part in packed.tensors()]
    for name, weight in model.state_dict().items():
        if name not in inside:
            flat = weight.detach().flatten()
            samples[name] = flat[:: max(1, flat.numel() // 16)][:16]
    return samples
