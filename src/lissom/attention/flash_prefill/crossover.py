"""From which length on sparse attention can be faster than dense attention, by the rules and by measurement."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from lissom.attention.flash_prefill.prefill import Precision, sparse_prefill
from lissom.devices.machine import describe
from lissom.errors import UserError
from lissom.files import atomic_path
from lissom.kernels import native
from lissom.kernels.blocks import TILE, Rules
from lissom.models.assets import cache_dir

_LONGEST_TRIED = 16384  # tokens for which dense attention is compared
_PATIENCE = 1.0  # seconds after which no longer prompt is tried


@cache
def first_sparse(rules: Rules) -> int:
    """Tokens of the shortest prompt of whole blocks of which something can be left out."""
    first = -(-(rules.sink + max(1, rules.window)) * rules.size // TILE)  # tile that does not see all before it
    return -(-((first + rules.last) * TILE + 1) // rules.size) * rules.size


@cache
def crossover(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    rules: Rules,
    alpha: float,
    precision: Precision,
    natively: bool,
) -> int:
    """Tokens of the shortest prompt for which sparse attention is faster here than dense attention, that is SDPA or
    `natively` the same kernel with all blocks: measured on `planted` queries and keys, once on a machine, so that the
    same prompt is not read sparsely by one process and densely by the next.

    Args:
        shape: query heads, KV heads and head_dim.
    """
    machine = describe()
    here = [machine["machine"]["cpu"], torch.get_num_threads(), machine["versions"], native.status().isa, device]
    facts = [*here, shape, str(dtype), asdict(rules), alpha, precision, natively]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    known = cache_dir() / "crossover" / key
    try:
        return int(known.read_text())
    except (OSError, ValueError):
        tokens = _measured(shape, dtype, device, rules, alpha, precision, natively)
    with (
        suppress(UserError),
        atomic_path(known) as temporary,
    ):  # a folder that cannot be written to is no reason to stop
        temporary.write_text(str(tokens))
    return tokens


def _measured(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    rules: Rules,
    alpha: float,
    precision: Precision,
    natively: bool,
) -> int:
    tokens, begun = first_sparse(rules), time.perf_counter()
    while tokens < _LONGEST_TRIED:
        query, key, value = (part.to(device, dtype) for part in planted(tokens, *shape))
        ours = partial(sparse_prefill, query, key, value, rules=rules, precision=precision)
        sparse = partial(ours, alpha=alpha)
        dense: Callable[[], Any] = partial(ours, alpha=0.0)
        if not natively:
            dense = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        one, other = (min(_seconds(work, query) for _ in range(3)) for work in (sparse, dense))
        if one < other:
            return tokens
        if time.perf_counter() - begun > _PATIENCE:
            # Of twice the tokens sparse attention takes at least twice the time, dense attention four times.
            return tokens * 2 ** math.ceil(math.log2(one / other))
        tokens *= 2
    return tokens


def planted(
    entries: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one layer, fp32 `[1, heads, entries, head_dim]`, that attend as heads of language
    models do: to the first entries, to the latest ones, and to what is about the same thing.

    Every block of 128 entries is about one of 32 things, whose direction its keys share; a query looks for the thing of
    its own block and, half as strongly, for one other. The first entries' keys are large in the direction of all
    queries.
    """
    draw = torch.Generator(device).manual_seed(seed)
    normal, integers = partial(torch.randn, generator=draw, device=device), partial(torch.randint, generator=draw)
    blocks, group = -(-entries // 128), heads // kv_heads
    things = F.normalize(normal(kv_heads, 32, head_dim), dim=-1)
    about = integers(32, (kv_heads, blocks), device=device)
    other = integers(32, (heads, blocks), device=device)
    common = F.normalize(normal(kv_heads, 1, head_dim), dim=-1)

    def spread(of: torch.Tensor) -> torch.Tensor:
        return of.repeat_interleave(128, 1)[:, :entries]

    strength = head_dim**0.5
    own = torch.stack([things[head, about[head]] for head in range(kv_heads)])
    second = torch.stack([things[head // group, other[head]] for head in range(heads)])
    key = spread(own) * 4.0 + normal(kv_heads, entries, head_dim)
    key[:, :4] += 6.0 * common
    query = (spread(own).repeat_interleave(group, 0) + 0.5 * spread(second)) * strength
    query += strength * common.repeat_interleave(group, 0) + normal(heads, entries, head_dim)
    value = normal(kv_heads, entries, head_dim)
    return query[None], key[None], value[None]


def now(like: torch.Tensor) -> float:
    """When everything before it was computed."""
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _seconds(work: Callable[[], Any], like: torch.Tensor) -> float:
    begun = now(like)
    work()
    return now(like) - begun
