"""Attention of a prompt's tokens over chosen blocks of entries, on a GPU, in Triton.

With `TRITON_INTERPRET=1`, set before Triton is imported, the kernels run on the CPU, slowly: so they are tested.
Shapes are those of one sequence; a batch of equal ones is one with as many times the heads.
"""

# mypy: disable-error-code="no-untyped-def,no-any-return,import-untyped,import-not-found"
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from lissom.kernels.sparse_attention import TILE

# The interpreter's products and sums of bf16 are wrong: there everything is widened first.
_WIDENED = os.environ.get("TRITON_INTERPRET") == "1"
_COLUMNS = 64  # entries, or means, that a program reads at a time


@triton.jit
def _tile(place, tokens, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Tokens `[ROWS]` and heads within the group `[ROWS]` of this program's tile, which of them there are, and the
    position of its first token."""
    wide = ROWS // GROUP
    start = (place // wide + tl.program_id(0)) * wide - place
    first = tl.maximum(start, 0)
    r = tl.arange(0, ROWS)
    token = first + r // GROUP
    real = (r < wide * GROUP) & (token < tl.minimum(tokens, start + wide))
    return token, r % GROUP, real, place + first


@triton.jit
def _rows(base, index, real, D: tl.constexpr, DEEP: tl.constexpr, WIDENED: tl.constexpr):
    """Vectors `[rows, DEEP]` at `index`, zero where there are none and behind their D dimensions."""
    d = tl.arange(0, DEEP)
    vectors = tl.load(base + index[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
    return vectors.to(tl.float32) if WIDENED else vectors


@triton.jit
def _energies(
    query, means, energies, tokens, place, blocks, scale,
    HEADS_OF_KV: tl.constexpr, GROUP: tl.constexpr, NORMALISED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DEEP: tl.constexpr, COLUMNS: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1).to(tl.int64)
    token, head, real, _ = _tile(place, tokens, GROUP, ROWS)
    q = _rows(query, (item * GROUP + head) * tokens + token, real, D, DEEP, WIDENED)
    kv = item * GROUP // HEADS_OF_KV
    whole = (place + token + 1) // SIZE  # blocks that a query sees all of
    top = tl.full([ROWS], 0.0, tl.float32)
    if NORMALISED:
        top = tl.full([ROWS], -1e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        for first in range(0, blocks, COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            k = _rows(means, kv * blocks + j, j < blocks, D, DEEP, WIDENED)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            logits = tl.where(real[:, None] & (j[None, :] < whole[:, None]), logits, float("-inf"))
            now = tl.maximum(top, tl.max(logits, 1))
            mass = mass * tl.exp(top - now) + tl.sum(tl.exp(logits - now[:, None]), 1)
            top = now
        top = top + tl.log(tl.maximum(mass, 1e-30))
    out = energies + (item * tl.num_programs(0) + tl.program_id(0)) * blocks
    for first in range(0, blocks, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        k = _rows(means, kv * blocks + j, j < blocks, D, DEEP, WIDENED)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - top[:, None]
        logits = tl.where(real[:, None] & (j[None, :] < whole[:, None]), logits, float("-inf"))
        highest = tl.maximum(tl.max(logits, 0), -1e30)
        tl.store(out + j, highest + tl.log(tl.sum(tl.exp(logits - highest[None, :]), 0)), mask=j < blocks)


@triton.jit
def _absorb(q, k, v, bias, scale, top, mass, out):
    """One step of the online softmax; `bias` is -inf where a query does not see an entry."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    now = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp(logits - safe[:, None])
    shrink = tl.exp(top - safe)
    mass = mass * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return now, mass, out


@triton.jit
def _attend(
    query, keys, values, lists, counts, mean_keys, mean_values, selected, output, lse, dropped,
    tokens, entries, place, blocks, scale,
    HEADS_OF_KV: tl.constexpr, GROUP: tl.constexpr, CORRECTED: tl.constexpr, ESTIMATED: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DEEP: tl.constexpr, COLUMNS: tl.constexpr,
    WIDENED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(1).to(tl.int64)
    token, head, real, start = _tile(place, tokens, GROUP, ROWS)
    index = (item * GROUP + head) * tokens + token
    q = _rows(query, index, real, D, DEEP, WIDENED)
    kv = item * GROUP // HEADS_OF_KV
    cell = item * tl.num_programs(0) + tl.program_id(0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DEEP], tl.float32)
    for i in range(tl.load(counts + cell)):
        block = tl.load(lists + cell * blocks + i)
        for part in range(0, SIZE, COLUMNS):
            j = block * SIZE + part + tl.arange(0, COLUMNS)
            k = _rows(keys, kv * entries + j, j < entries, D, DEEP, WIDENED)
            v = _rows(values, kv * entries + j, j < entries, D, DEEP, WIDENED)
            seen = (j[None, :] <= (place + token)[:, None]) & (j < entries)[None, :]
            top, mass, out = _absorb(q, k, v, tl.where(seen, 0.0, float("-inf")), scale, top, mass, out)
    if CORRECTED or ESTIMATED:
        # What was left out, as its means. It is part of the mass only where it is a correction.
        left_top, left_mass, left_out = top, mass, out
        for first in range(0, start // SIZE, COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            there = j < start // SIZE
            left = there & (tl.load(selected + cell * blocks + j, mask=there, other=1) == 0)
            k = _rows(mean_keys, kv * blocks + j, there, D, DEEP, WIDENED)
            v = _rows(mean_values, kv * blocks + j, there, D, DEEP, WIDENED)
            bias = tl.where(left, tl.log(SIZE * 1.0), float("-inf"))[None, :] + tl.zeros([ROWS, COLUMNS], tl.float32)
            left_top, left_mass, left_out = _absorb(q, k, v, bias, scale, left_top, left_mass, left_out)
        if ESTIMATED:
            kept = mass * tl.exp(tl.where(real, top - left_top, 0.0))
            tl.store(dropped + index, tl.where(left_mass > 0, 1.0 - kept / left_mass, 0.0), mask=real)
        if CORRECTED:
            top, mass, out = left_top, left_mass, left_out
    d = tl.arange(0, DEEP)
    out = tl.where(mass[:, None] > 0, out / mass[:, None], 0.0)
    tl.store(output + index[:, None] * D + d[None, :], out.to(output.dtype.element_ty),
             mask=real[:, None] & (d < D)[None, :])  # fmt: skip
    tl.store(lse + index, top + tl.log(mass), mask=real)


def _constants(query: torch.Tensor, keys: torch.Tensor, group: int, size: int) -> dict[str, int]:
    head_dim = query.shape[-1]
    return {
        "HEADS_OF_KV": len(query) // len(keys),
        "GROUP": group,
        "SIZE": size,
        "ROWS": TILE,
        "D": head_dim,
        "DEEP": max(16, triton.next_power_of_2(head_dim)),
        "COLUMNS": _COLUMNS,
        "WIDENED": _WIDENED,
        "num_warps": 4 if head_dim <= 64 else 8,
        "num_stages": 2,
    }


def block_energies(
    query: torch.Tensor, means: torch.Tensor, entries: int, group: int, size: int, scale: float, normalised: bool
) -> torch.Tensor:
    """Logarithms of energies, fp32 `[lists, tiles, blocks]`: see `selection.energies` of FlashPrefill.

    Args:
        query: `[query heads, tokens, head_dim]`, of the last of `entries` tokens.
        means: of the keys of each block, `[KV heads, blocks, head_dim]`.
        group: query heads that have a list together.
    """
    heads, tokens, _ = query.shape
    place, wide = entries - tokens, TILE // group
    tiles = (entries - 1) // wide - place // wide + 1
    out = torch.empty(heads // group, tiles, means.shape[1], dtype=torch.float32, device=query.device)
    _energies[(tiles, heads // group)](
        query.contiguous(), means.contiguous(), out, tokens, place, means.shape[1], scale,
        NORMALISED=normalised, **_constants(query, means, group, size),
    )  # fmt: skip
    return out


def block_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    selected: torch.Tensor,
    group: int,
    size: int,
    scale: float,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
    corrected: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output `[query heads, tokens, head_dim]`, log-sum-exp `[query heads, tokens]`, and the estimated share of the
    attention that was left out, `[query heads, tokens]`, or nothing where there are no `means`.

    Args:
        query: `[query heads, tokens, head_dim]`.
        keys, values: `[KV heads, entries, head_dim]`.
        selected: bool `[lists, tiles, blocks]`.
        means: of the keys and of the values of each block.
        corrected: whether they count in the place of what was left out.
    """
    heads, tokens, _ = query.shape
    entries, blocks = keys.shape[1], selected.shape[-1]
    order = torch.cumsum(selected, -1, dtype=torch.int32) - 1
    lists = torch.zeros(selected.shape, dtype=torch.int32, device=query.device)
    places = torch.arange(blocks, dtype=torch.int32, device=query.device).expand(selected.shape)
    lists.scatter_add_(-1, order.clamp(min=0).long(), torch.where(selected, places, 0))
    output, lse = (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty(heads, tokens, dtype=torch.float32),
    )
    dropped = torch.empty_like(lse) if means else lse.new_empty(0)
    mean_keys, mean_values = means or (keys, values)
    _attend[(selected.shape[1], heads // group)](
        query.contiguous(), keys.contiguous(), values.contiguous(), lists, order[..., -1].contiguous() + 1,
        mean_keys.contiguous(), mean_values.contiguous(), selected.to(torch.int8).contiguous(), output, lse, dropped,
        tokens, entries, entries - tokens, blocks, scale,
        CORRECTED=corrected, ESTIMATED=means is not None, **_constants(query, keys, group, size),
    )  # fmt: skip
    return output, lse, dropped
