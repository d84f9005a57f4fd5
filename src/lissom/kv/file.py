"""Compacted caches on disk: one safetensors file with what is needed to use it again, and only with its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from lissom.errors import UserError
from lissom.kv.cache import CompactCache, CompactLayer, WindowLayer
from lissom.kv.storage import Block, RaggedStore
from lissom.models import fingerprint
from lissom.sealed import Sealed

_FILE = Sealed("lissom-compact-cache", 2, "cache file", "Compact the document again.")


def save(
    cache: CompactCache,
    path: str | Path,
    model: PreTrainedModel,
    *,
    tokens: torch.Tensor | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write `cache` to a safetensors file, atomically.

    Args:
        tokens: ids `[rows, tokens]` that were read, so that `generate` can be called from the file alone.
        settings: how it was made; stored for the reader.
    """
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, Any] = {}
    for index, layer in cache.compact_layers():
        store = layer.store
        if store is None:
            raise UserError("The cache is empty: there is nothing to save.")
        name = f"layers.{index}."
        tensors |= {name + part: tensor for part, tensor in store.entries().items()}
        tensors[name + "lengths"] = store.lengths
        layers[str(index)] = {"rows": store.rows, "logical": layer.logical, "tail": layer.tail}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CompactLayer | DynamicSlidingWindowLayer):
            raise UserError(f"A cache with a {type(layer).__name__} cannot be saved: only attention layers can.")
        if isinstance(layer, WindowLayer):
            tensors[f"sliding.{index}.keys"], tensors[f"sliding.{index}.values"] = layer.dense()
            layers[str(index)] = {"sliding": layer.logical}
        if isinstance(layer, DynamicSlidingWindowLayer):
            tensors[f"sliding.{index}.keys"] = layer.keys.contiguous()
            tensors[f"sliding.{index}.values"] = layer.values.contiguous()
            layers[str(index)] = {"sliding": layer.cumulative_length}
    if tokens is not None:
        tensors["tokens"] = tokens.cpu().contiguous()
    header = {"model": fingerprint(model), "layers": layers, "settings": settings or {}}
    _FILE.save(path, header, tensors)


def load(path: str | Path, model: PreTrainedModel) -> tuple[CompactCache, torch.Tensor | None, dict[str, Any]]:
    """Read a cache that `save` wrote for this model.

    Returns:
        The cache, the token ids that were read (None where they were not stored) and the settings.

    Raises:
        UserError: the file is missing, damaged, no compacted cache, or belongs to another model.
    """
    header, tensors = _FILE.load(path)
    own = fingerprint(model)
    if header.get("model") != own:
        raise UserError(
            f"{path} was made for another model (fingerprint {header.get('model')}, this one has {own}): "
            "load the model that it was compacted with."
        )
    cache = CompactCache(model)
    try:
        for index, layer in cache.compact_layers():
            _restore(layer, header["layers"][str(index)], f"layers.{index}.", tensors, model)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                keys, values = (
                    tensors[f"sliding.{index}.{part}"].to(model.device, model.dtype) for part in ("keys", "values")
                )
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                layer.cumulative_length = header["layers"][str(index)]["sliding"]
    except (KeyError, RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is damaged: {error}. Compact the document again.") from error
    return cache, tensors.get("tokens"), header.get("settings", {})


def _restore(
    layer: Any, shape: dict[str, int], name: str, tensors: dict[str, torch.Tensor], model: PreTrainedModel
) -> None:
    device, lengths = model.device, tensors[name + "lengths"].tolist()
    # A model may be loaded in another dtype than the one that wrote the cache.
    is_int8 = tensors[name + "keys"].dtype == torch.int8
    parts = []
    for part, scales in (("keys", "key_scales"), ("values", "value_scales")):
        vectors = tensors[name + part].to(device)
        whole = vectors.float() * tensors[name + scales].to(device)[:, None].float() if is_int8 else vectors
        parts.append((whole if is_int8 else whole.to(model.dtype)).split(lengths))
    parts.append(tensors[name + "positions"].to(device).split(lengths))
    bias = tensors.get(name + "bias")
    biases = [None] * len(lengths) if bias is None else bias.to(device).split(lengths)
    blocks = [Block(k, v, p, b) for k, v, p, b in zip(*parts, biases, strict=True)]
    layer.store = RaggedStore(blocks, shape["rows"], dtype=torch.int8 if is_int8 else None)
    layer.logical, layer.tail = shape["logical"], shape["tail"]
