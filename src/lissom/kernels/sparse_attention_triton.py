"""Attention of a prompt's tokens over chosen blocks of entries, on a GPU, in Triton.

Kernels for means of blocks, their energies, lists of those that are met, and attention along the lists. With
`TRITON_INTERPRET=1`, set before Triton is imported, they run on the CPU, slowly: so they are tested. Shapes are those
of one sequence.
"""

# mypy: disable-error-code="no-untyped-def,no-any-return,import-untyped,import-not-found"
from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lissom.kernels.blocks import TILE, Layout

# The interpreter's products and sums of bf16 are wrong: there everything is widened first.
_WIDENED = os.environ.get("TRITON_INTERPRET") == "1"
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(tile, place, tokens, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Tokens `[ROWS]` and heads within the group `[ROWS]` of a tile, which of them there are, and the position of its
    first token."""
    wide = ROWS // GROUP
    start = (place // wide + tile) * wide - place
    first = tl.maximum(start, 0)
    r = tl.arange(0, ROWS)
    token = first + r // GROUP
    real = (r < wide * GROUP) & (token < tl.minimum(tokens, start + wide))
    return token, r % GROUP, real, place + first


@triton.jit
def _rows(base, index, real, D: tl.constexpr, DEEP: tl.constexpr, WIDENED: tl.constexpr):
    """Vectors `[rows, DEEP]` at `index`, zero where there are none and behind their D dimensions."""
    d = tl.arange(0, DEEP)
    there = real[:, None]
    if D != DEEP:
        there = there & (d < D)[None, :]
    vectors = tl.load(base + index[:, None] * D + d[None, :], mask=there, other=0.0)
    return vectors.to(tl.float32) if WIDENED else vectors


@triton.jit
def _every_row(base, index, D: tl.constexpr, DEEP: tl.constexpr, WIDENED: tl.constexpr):
    """The same where there are all."""
    d = tl.arange(0, DEEP)
    at = base + index[:, None] * D + d[None, :]
    if D == DEEP:  # noqa: SIM108 - a compile-time choice
        vectors = tl.load(at)
    else:
        vectors = tl.load(at, mask=(d < D)[None, :], other=0.0)
    return vectors.to(tl.float32) if WIDENED else vectors


@triton.jit
def _logits(q, k, scale, seen):
    """Those that are no finite numbers count as those of blocks that are not seen."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(seen & (logits < float("inf")), logits, float("-inf"))


@triton.jit(do_not_specialize=["entries", "blocks"])
def _means(
    vectors, means, entries, blocks, SIZE: tl.constexpr, D: tl.constexpr, DEEP: tl.constexpr, WIDENED: tl.constexpr
):  # fmt: skip
    block, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = block * SIZE + tl.arange(0, SIZE)
    part = _rows(vectors, item * entries + j, j < entries, D, DEEP, WIDENED).to(tl.float32)
    mean = tl.sum(part, 0) / tl.minimum(SIZE, entries - block * SIZE)
    d = tl.arange(0, DEEP)
    tl.store(means + (item * blocks + block) * D + d, mean.to(means.dtype.element_ty), mask=d < D)


# Integers are not made part of the code, as Triton does with 1 and multiples of 16: each prompt would be compiled for.
@triton.jit(do_not_specialize=["tokens", "place", "blocks"])
def _energies(
    query, means, energies, tokens, place, blocks, scale,
    HEADS_OF_KV: tl.constexpr, GROUP: tl.constexpr, NORMALISED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, DEEP: tl.constexpr, COLUMNS: tl.constexpr, WIDENED: tl.constexpr,
):  # fmt: skip
    tile, item = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, head, real, _ = _tile(tile, place, tokens, GROUP, ROWS)
    q = _rows(query, (item * GROUP + head) * tokens + token, real, D, DEEP, WIDENED)
    kv = item * GROUP // HEADS_OF_KV
    whole = tl.where(real, (place + token + 1) // SIZE, 0)  # blocks that a query sees all of
    scored = tl.max(whole)
    top = tl.full([ROWS], 0.0, tl.float32)
    if NORMALISED:
        top = tl.full([ROWS], -1e30, tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        for first in range(0, scored, COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            k = _rows(means, kv * blocks + j, j < scored, D, DEEP, WIDENED)
            logits = _logits(q, k, scale, j[None, :] < whole[:, None])
            now = tl.maximum(top, tl.max(logits, 1))
            mass = mass * tl.exp(top - now) + tl.sum(tl.exp(logits - now[:, None]), 1)
            top = now
        top = top + tl.log(tl.maximum(mass, 1e-30))
    out = energies + (item * tl.num_programs(0) + tile) * blocks
    for first in range(0, scored, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        k = _rows(means, kv * blocks + j, j < scored, D, DEEP, WIDENED)
        logits = _logits(q, k, scale, j[None, :] < whole[:, None]) - top[:, None]
        highest = tl.maximum(tl.max(logits, 0), -1e30)
        tl.store(out + j, highest + tl.log(tl.sum(tl.exp(logits - highest[None, :]), 0)), mask=j < scored)


@triton.jit(do_not_specialize=["place", "entries", "following", "blocks", "sink", "window", "last"])
def _lists(
    energies, thresholds, selected, lists, counts, place, entries, following, blocks, sink, window, last,
    GIVEN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of each tile the blocks that it meets, in their order; how many there are, and how many of them all its queries
    see all of."""
    tile, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cell = item * tl.num_programs(0) + tile
    begin = place // WIDE + tile
    start = tl.maximum(begin * WIDE, place)
    end = tl.minimum((begin + 1) * WIDE, entries)
    own, visible = start // SIZE, (end - 1) // SIZE + 1
    dense = tl.where(
        begin >= (entries + following + WIDE - 1) // WIDE - last, blocks, 0
    )  # blocks that are met in any case
    least = float("-inf")
    if not GIVEN:
        for first in range(0, visible, COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            energy = tl.load(energies + cell * blocks + j, mask=j < visible, other=float("-inf"))
            least = tl.maximum(least, tl.max(energy, 0))
        threshold = tl.load(thresholds + item)
        # A block without energy is never chosen, unless all are.
        least = tl.where(threshold > float("-inf"), tl.maximum(least + threshold, -1e30), float("-inf"))
    count = 0
    plain = 0
    for first in range(0, visible, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        there = j < visible
        if GIVEN:
            met = tl.load(selected + cell * blocks + j, mask=there, other=0) != 0
        else:
            energy = tl.load(energies + cell * blocks + j, mask=there, other=float("-inf"))
            met = there & ((energy >= least) | (j < sink) | (j > own - window) | (j < dense))
            tl.store(selected + cell * blocks + j, met.to(tl.int8), mask=there)
        one = met.to(tl.int32)
        tl.store(lists + cell * blocks + count + tl.cumsum(one, 0) - one, j, mask=met)
        count += tl.sum(one, 0)
        plain += tl.sum(tl.where(j < own, one, 0), 0)
    tl.store(counts + 2 * cell, plain)
    tl.store(counts + 2 * cell + 1, count)


@triton.jit
def _absorb(q, k, v, bias, scale, top, mass, out):
    """One step of the online softmax, in powers of 2; `bias` is -inf where a query does not see an entry."""
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias
    now = tl.maximum(top, tl.max(logits, 1))
    safe = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(top - safe)
    mass = mass * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return now, mass, out


@triton.jit(do_not_specialize=["tokens", "entries", "place", "blocks"])
def _attend(
    query, keys, values, lists, counts, mean_keys, mean_values, selected, output, lse, dropped,
    tokens, entries, place, blocks, scale,
    HEADS_OF_KV: tl.constexpr, GROUP: tl.constexpr, CORRECTED: tl.constexpr, ESTIMATED: tl.constexpr,
    SIZE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DEEP: tl.constexpr, COLUMNS: tl.constexpr,
    WIDENED: tl.constexpr,
):  # fmt: skip
    # The last tiles, which may be dense, begin first.
    tile, item = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, head, real, start = _tile(tile, place, tokens, GROUP, ROWS)
    index = (item * GROUP + head) * tokens + token
    q = _rows(query, index, real, D, DEEP, WIDENED)
    kv = item * GROUP // HEADS_OF_KV
    cell = item * tl.num_programs(0) + tile
    scale = scale * _LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, DEEP], tl.float32)
    PARTS: tl.constexpr = SIZE // COLUMNS
    plain = tl.load(counts + 2 * cell) * PARTS
    for i in range(0, plain):
        j = tl.load(lists + cell * blocks + i // PARTS) * SIZE + i % PARTS * COLUMNS + tl.arange(0, COLUMNS)
        k = _every_row(keys, kv * entries + j, D, DEEP, WIDENED)
        v = _every_row(values, kv * entries + j, D, DEEP, WIDENED)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        now = tl.maximum(top, tl.max(logits, 1) * scale)
        weights = tl.exp2(logits * scale - now[:, None])
        shrink = tl.exp2(top - now)
        mass = mass * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        top = now
    for i in range(plain, tl.load(counts + 2 * cell + 1) * PARTS):
        j = tl.load(lists + cell * blocks + i // PARTS) * SIZE + i % PARTS * COLUMNS + tl.arange(0, COLUMNS)
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
            bias = tl.where(left, tl.log2(SIZE * 1.0), float("-inf"))[None, :] + tl.zeros([ROWS, COLUMNS], tl.float32)
            left_top, left_mass, left_out = _absorb(q, k, v, bias, scale, left_top, left_mass, left_out)
        if ESTIMATED:
            kept = mass * tl.exp2(tl.where(real, top - left_top, 0.0))
            tl.store(dropped + index, 1.0 - kept / left_mass, mask=real)
        if CORRECTED:
            top, mass, out = left_top, left_mass, left_out
    d = tl.arange(0, DEEP)
    out = out / mass[:, None]
    tl.store(output + index[:, None] * D + d[None, :], out.to(output.dtype.element_ty),
             mask=real[:, None] & (d < D)[None, :])  # fmt: skip
    tl.store(lse + index, (top + tl.log2(mass)) / _LOG2E, mask=real)


def _constants(query: torch.Tensor, keys: torch.Tensor, layout: Layout) -> dict[str, int]:
    head_dim = query.shape[-1]
    return {
        "HEADS_OF_KV": len(query) // len(keys),
        "GROUP": layout.group,
        "SIZE": layout.size,
        "ROWS": TILE,
        "D": head_dim,
        "DEEP": _deep(head_dim),
        "WIDENED": _WIDENED,
    }


def _deep(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _pace(query: torch.Tensor, size: int) -> dict[str, int]:
    """Entries at a time, warps and stages of `_attend`: the fastest of some on an H100."""
    deep, wide = _deep(query.shape[-1]), query.element_size() > 2
    if wide or deep > 128:
        return {"COLUMNS": 32 if wide and deep > 64 else 64, "num_warps": 8, "num_stages": 1 if wide else 2}
    return {"COLUMNS": size, "num_warps": 4 if deep <= 64 else 8, "num_stages": 2 if deep <= 64 else 3}


def sparse_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: Layout,
    scale: float,
    alpha: torch.Tensor,
    selected: torch.Tensor | None = None,
    estimate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp, the blocks that were met, and the estimated share that was left out: see `block_attention`.

    Args:
        alpha: `[query heads]`; of heads that have a list together the first one's counts.
        selected: the blocks, where the rules shall not choose them.
    """
    means = block_means(keys, layout)
    chosen = (
        choose(query, means, layout, scale, alpha[:: layout.group]) if selected is None else given(selected, layout)
    )
    both = (means, block_means(values, layout)) if layout.rules.corrected or estimate else None
    output, lse, dropped = block_attention(query, keys, values, chosen, layout, scale, both, estimate)
    return output, lse, chosen.selected, dropped


class Chosen(NamedTuple):
    """Blocks that tiles meet.

    Attributes:
        selected: bool `[lists, tiles, blocks]`.
        lists: int32 of the same shape, their numbers in ascending order, and anything behind them.
        counts: int32 `[lists, tiles, 2]`: how many of these all queries of the tile see all of, and how many there are.
    """

    selected: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor


def block_means(vectors: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`[heads, entries, head_dim]` to the mean of each block `[heads, blocks, head_dim]`: see `selection.means`."""
    heads, entries, head_dim = vectors.shape
    out = vectors.new_empty(heads, layout.blocks, head_dim)
    _means[(layout.blocks, heads)](
        vectors.contiguous(), out, entries, layout.blocks, SIZE=layout.size, D=head_dim, DEEP=_deep(head_dim),
        WIDENED=_WIDENED,
    )  # fmt: skip
    return out


def block_energies(query: torch.Tensor, means: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """Logarithms of energies, fp32 `[lists, tiles, blocks]`: see `selection.energies` of FlashPrefill.

    Args:
        query: `[query heads, tokens, head_dim]`.
        means: of the keys of each block, `[KV heads, blocks, head_dim]`.
    """
    lists = len(query) // layout.group
    out = query.new_full((lists, layout.tiles, layout.blocks), -torch.inf, dtype=torch.float32)
    _energies[(layout.tiles, lists)](
        query.contiguous(), means.contiguous(), out, layout.tokens, layout.place, layout.blocks, scale,
        NORMALISED=layout.rules.scoring == "row-normalised", **_constants(query, means, layout), COLUMNS=32,
        num_warps=4 if query.shape[-1] <= 128 else 8, num_stages=3 if query.element_size() <= 2 else 1,
    )  # fmt: skip
    return out


def choose(query: torch.Tensor, means: torch.Tensor, layout: Layout, scale: float, alpha: torch.Tensor) -> Chosen:
    """Blocks by their energies, and those that are always met.

    Args:
        query, means: see `block_energies`.
        alpha: `[lists]`, of the largest energy.
    """
    return _listed(block_energies(query, means, layout, scale), alpha.float().log().to(query.device), layout)


def given(selected: torch.Tensor, layout: Layout) -> Chosen:
    """The blocks of `selected`, bool `[lists, tiles, blocks]`."""
    return _listed(selected, None, layout)


def _listed(of: torch.Tensor, thresholds: torch.Tensor | None, layout: Layout) -> Chosen:
    rules = layout.rules
    if thresholds is None:
        selected = of.to(torch.int8).contiguous()
    else:
        selected = torch.zeros(of.shape, dtype=torch.int8, device=of.device)
    lists = torch.empty(of.shape, dtype=torch.int32, device=of.device)
    counts = lists.new_empty(*of.shape[:2], 2)
    _lists[(layout.tiles, len(of))](
        of, thresholds, selected, lists, counts, layout.place, layout.entries, rules.following, layout.blocks,
        rules.sink, max(1, rules.window), rules.last,
        GIVEN=thresholds is None, SIZE=layout.size, WIDE=layout.wide, COLUMNS=256, num_warps=4,
    )  # fmt: skip
    return Chosen(selected.bool(), lists, counts)


def block_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chosen: Chosen,
    layout: Layout,
    scale: float,
    means: tuple[torch.Tensor, torch.Tensor] | None = None,
    estimate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output `[query heads, tokens, head_dim]`, log-sum-exp `[query heads, tokens]`, and the estimated share of the
    attention that was left out, `[query heads, tokens]`, or nothing without `estimate`.

    Args:
        query: `[query heads, tokens, head_dim]`.
        keys, values: `[KV heads, entries, head_dim]`.
        means: of the keys and of the values of each block; needed where they correct the output or for an estimate.
    """
    query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
    output, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    dropped = torch.empty_like(lse) if estimate else lse.new_empty(0)
    mean_keys, mean_values = (part.contiguous() for part in means or (keys, values))
    _attend[(layout.tiles, len(chosen.lists))](
        query, keys, values, chosen.lists, chosen.counts, mean_keys, mean_values, chosen.selected.view(torch.int8),
        output, lse, dropped, layout.tokens, layout.entries, layout.place, layout.blocks, scale,
        CORRECTED=layout.rules.corrected, ESTIMATED=estimate, **_constants(query, keys, layout),
        **_pace(query, layout.size),
    )  # fmt: skip
    return output, lse, dropped
