"""Attention over selected blocks in plain PyTorch: tile by tile, on what is selected alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lissom.attention.flash_prefill.selection import above, energies, means, with_forced
from lissom.kernels.blocks import Layout

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    if selected is None:
        energy = energies(query, keys, layout, scale)
        selected = with_forced(above(energy, alpha[:: layout.group].to(query.device)), layout)
    output, lse, dropped = block_attention(query, keys, values, selected, layout, scale, estimate)
    return output, lse, selected, dropped


def block_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    selected: torch.Tensor,
    layout: Layout,
    scale: float,
    estimate: bool = False,
) -> Parts:
    """Output, log-sum-exp, and the estimated share of the attention that was left out (empty without `estimate`).

    Args:
        query: `[query heads, tokens, head_dim]`.
        keys, values: `[KV heads, entries, head_dim]`.
        selected: bool `[lists, tiles, blocks]`.

    With corrected rules a block that is left out counts as its mean, with the logarithm of its size added to the logit
    (V2's mean correction).

    Returns:
        `[query heads, tokens, head_dim]` in the dtype of the query, `[query heads, tokens]` and the same, fp32 (float64
        of float64).
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lists, size = len(selected), layout.size
    missing = layout.blocks * size - layout.entries
    blocked = [F.pad(part.to(dtype), (0, 0, 0, missing)).unflatten(1, (-1, size)) for part in (keys, values)]
    middle = [means(part, size).to(dtype) for part in (keys, values)]
    heads = torch.arange(lists, device=query.device) * len(keys) // lists
    grouped = query.to(dtype).view(lists, -1, *query.shape[1:])
    outputs = torch.empty_like(grouped)
    lse = outputs.new_empty(outputs.shape[:3])
    dropped = torch.empty_like(lse) if estimate else lse.new_empty(0)
    for tile, (first, last) in enumerate(layout.spans()):
        here = selected[:, tile]
        width = int(here.sum(-1).max())
        order = here.byte().argsort(dim=-1, descending=True, stable=True)[:, :width]
        taken = here.gather(-1, order)
        key, value = (part[heads[:, None], order].flatten(1, 2) for part in blocked)
        columns = (order[..., None] * size + torch.arange(size, device=query.device)).flatten(1)
        positions = layout.place + torch.arange(first, last, device=query.device)
        visible = (columns[:, None] <= positions[:, None]) & taken.repeat_interleave(size, 1)[:, None]
        q = grouped[:, :, first:last]
        # What is not attended to may be no number: neither its logits nor its values may come into a sum.
        value = value.masked_fill(~visible.any(1)[..., None], 0.0)
        logits = (q @ key.transpose(-1, -2)[:, None] * scale).masked_fill(~visible[:, None], -torch.inf)
        mass = logits.logsumexp(-1)
        whole = (layout.place + first) // size
        if (layout.rules.corrected or estimate) and whole:
            left = ~here[:, :whole]
            rest = q @ middle[0][heads, :whole].transpose(-1, -2)[:, None] * scale + math.log(size)
            rest = rest.masked_fill(~left[:, None, None], -torch.inf)
            both = torch.cat([logits, rest], -1)
            if estimate:
                dropped[:, :, first:last] = -torch.expm1(mass - both.logsumexp(-1))
            if layout.rules.corrected:
                logits, mass = both, both.logsumexp(-1)
                value = torch.cat([value, middle[1][heads, :whole]], 1)
        elif estimate:
            dropped[:, :, first:last] = 0.0
        outputs[:, :, first:last] = logits.softmax(-1) @ value[:, None]
        lse[:, :, first:last] = mass
    shape = query.shape[:2]
    return (
        outputs.view(query.shape).to(query.dtype),
        lse.view(shape),
        dropped.view(shape) if estimate else dropped,
    )
