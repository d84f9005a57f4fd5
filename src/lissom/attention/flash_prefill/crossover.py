"""From which length on sparse attention can be faster than dense attention, by the rules and by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from lissom.attention.flash_prefill.prefill import Precision, sparse_prefill
from lissom.kernels.blocks import TILE, Rules

_LONGEST_TRIED = 16384  # tokens for which dense attention is compared


@cache
def first_sparse(rules: Rules) -> int:
    """Tokens of the shortest prompt of whole blocks of which something can be left out."""
    first = -(-(rules.sink + max(1, rules.window)) * rules.size // TILE)  # tile that does not see all before it
    return -(-((first + rules.last) * TILE + 1) // rules.size) * rules.size


@cache
def crossover(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    rules: Rules,
    precision: Precision,
    natively: bool,
) -> int:
    """Tokens of the shortest prompt for which sparse attention can be faster here than dense attention, that is SDPA or
    `natively` the same kernel with all blocks: measured once on random numbers, with no more than what is always met.
    """
    tokens, generator = first_sparse(rules), torch.Generator("cpu").manual_seed(0)
    while tokens < _LONGEST_TRIED:
        shapes = [(1, count, tokens, head_dim) for count in (heads, kv_heads, kv_heads)]
        query, key, value = (
            torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes
        )
        ours = partial(sparse_prefill, query, key, value, rules=rules, precision=precision)
        sparse = partial(ours, alpha=2.0)
        dense: Callable[[], Any] = partial(ours, alpha=0.0)
        if not natively:
            dense = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        if min(_seconds(sparse, query) for _ in range(3)) < min(_seconds(dense, query) for _ in range(3)):
            return tokens
        tokens *= 2
    return tokens


def now(like: torch.Tensor) -> float:
    """When everything before it was computed."""
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(work: Callable[[], Any], like: torch.Tensor) -> float:
    begun = now(like)
    work()
    return now(like) - begun
