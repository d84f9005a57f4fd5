"""Reference pictures of a FLUX.2-like transformer, read once: keys and values of their tokens in every block.

References that see neither noise nor text nor time have keys and values that are a function of the references alone, so
a pass over them alone, at the fixed timestep 0 and without text, gives all that other tokens ever need of them. The
cache and what reads it are diffusers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)

from lissom.errors import UserError

POSITION_OF_REFERENCES = 0  # axis of positions on which references are not at 0
REFERENCE_DISTANCE = 10  # between references on it (FLUX.2)


def prepare(transformer: Flux2Transformer2DModel) -> None:
    """Give every block the attention that reads and writes caches; without one it computes what the plain one does."""
    for blocks, kind in (
        (transformer.transformer_blocks, Flux2KVAttnProcessor),
        (transformer.single_transformer_blocks, Flux2KVParallelSelfAttnProcessor),
    ):
        for block in blocks:
            before, processor = block.attn.processor, kind()
            for name in ("_attention_backend", "_parallel_config"):
                setattr(processor, name, getattr(before, name, None))
            block.attn.set_processor(processor)


def read(
    transformer: Flux2Transformer2DModel,
    tokens: torch.Tensor,
    ids: torch.Tensor,
    lengths: Sequence[int] | None = None,
    guidance: torch.Tensor | None = None,
) -> Flux2KVCache:
    """Keys and values of references, after rotation, by a transformer that is `prepare`d.

    Args:
        tokens: `[batch, tokens of all references, channels]`.
        ids: `[tokens of all references, 4]`, their positions.
        lengths: tokens of each reference, where each sees only itself; None: they see each other.
        guidance: as the transformer takes it, where it does.

    Raises:
        UserError: it is not prepared.
    """
    parts = [
        _read(transformer, part, places, guidance)
        for part, places in zip(
            tokens.split(list(lengths or [tokens.shape[1]]), 1), ids.split(list(lengths or [len(ids)])), strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _read(
    transformer: Flux2Transformer2DModel, tokens: torch.Tensor, ids: torch.Tensor, guidance: torch.Tensor | None
) -> Flux2KVCache:
    batch = tokens.shape[0]
    found = transformer(
        hidden_states=tokens,
        encoder_hidden_states=tokens.new_zeros(batch, 0, transformer.config.joint_attention_dim),
        timestep=tokens.new_zeros(batch),
        img_ids=ids,
        txt_ids=ids[:0],
        guidance=guidance,
        kv_cache_mode="extract",
        num_ref_tokens=tokens.shape[1],
        return_dict=False,
    )
    cache: Flux2KVCache = found[1]
    if layers(cache)[0].k_ref is None:
        raise UserError("The transformer's attention writes no caches: call `prepare(transformer)` before.")
    return cache


def _joined(parts: Sequence[Flux2KVCache]) -> Flux2KVCache:
    """One cache, with the tokens of all parts in turn."""
    whole = Flux2KVCache(len(parts[0].double_block_caches), len(parts[0].single_block_caches))
    whole.num_ref_tokens = sum(part.num_ref_tokens for part in parts)
    for layer, *own in zip(layers(whole), *map(layers, parts), strict=True):
        layer.store(torch.cat([one.k_ref for one in own], 1), torch.cat([one.v_ref for one in own], 1))
    return whole


def moved(transformer: Flux2Transformer2DModel, keys: torch.Tensor, by: int) -> torch.Tensor:
    """Keys of a reference that lies `by` further on the first axis of positions; values do not depend on it.

    Args:
        keys: `[batch, tokens, heads, head_dim]`, after rotation.
    """
    if not by:
        return keys
    step = torch.zeros(1, len(transformer.pos_embed.axes_dim), dtype=torch.long, device=keys.device)
    step[0, POSITION_OF_REFERENCES] = by
    turned: torch.Tensor = apply_rotary_emb(keys, transformer.pos_embed(step), sequence_dim=1)
    return turned


def reference_numbers(count: int) -> range:
    """Where references lie on the first axis of positions, on which what is drawn lies at 0 (FLUX.2)."""
    return range(REFERENCE_DISTANCE, REFERENCE_DISTANCE * (count + 1), REFERENCE_DISTANCE)


def layers(cache: Flux2KVCache) -> list[Any]:
    """The cache of each block, in the order in which they run."""
    return [*cache.double_block_caches, *cache.single_block_caches]
