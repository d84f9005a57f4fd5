"""Which blocks of keys a tile of queries attends to: the semantics, in plain PyTorch.

One sequence at a time: queries `[query heads, tokens, head_dim]` and keys `[KV heads, entries, head_dim]`, where the
queries are those of the last `tokens` entries. A *tile* is `TILE` queries: so many tokens of one head, or, with shared
lists, `TILE / group` tokens of all heads of a KV head. Tiles and blocks are counted from the first entry, so that a
prompt read in stretches has the same ones.

A selection is a bool tensor `[lists, tiles, blocks]`, one list for each query head or, shared, for each KV head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lissom.kernels.blocks import Layout


def means(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """`[heads, entries, head_dim]` to the mean of each block `[heads, blocks, head_dim]`, summed in fp32 or better and
    stored in the dtype of `vectors`. A part of a block at the end is divided by what it has."""
    heads, entries, head_dim = vectors.shape
    missing = -entries % size
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    sums = F.pad(wide, (0, 0, 0, missing)).view(heads, -1, size, head_dim).sum(2)
    counts = torch.full((sums.shape[1], 1), size, dtype=sums.dtype, device=vectors.device)
    counts[-1] -= missing
    return (sums / counts).to(vectors.dtype)


def energies(query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """Logarithm of each block's energy `[lists, tiles, blocks]`, -inf where no query of the tile sees all of it.

    The scoring `flashprefill` is the paper's block score (V1 section 3.2, restated in V2): the sum over the tile's
    queries of e to the logit with the block's mean key. `row-normalised` sums each query's softmax over the blocks
    instead, so that queries with large logits do not outvote the others; it is an extension.

    Logits that are no finite numbers do not count: what is wrong in a block gets into the attention of those queries
    alone that would attend to it anyway.
    """
    middle = means(keys, layout.size)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(dtype).view(len(keys), -1, layout.tokens, query.shape[-1])
    ends = (torch.arange(layout.blocks, device=query.device) + 1) * layout.size - 1
    found = []
    for first, last in layout.spans():
        logits = grouped[:, :, first:last] @ middle.to(dtype).transpose(-1, -2)[:, None] * scale
        positions = layout.place + torch.arange(first, last, device=query.device)
        logits = logits.masked_fill((ends > positions[:, None]) | ~logits.isfinite(), -torch.inf)
        if layout.rules.scoring == "row-normalised":
            mass = logits.logsumexp(-1, keepdim=True)
            logits = logits - mass.masked_fill(mass.isinf(), 0.0)
        logits = logits.flatten(0, 1) if layout.group == 1 else logits.flatten(1, 2)
        found.append(logits.logsumexp(1))
    return torch.stack(found, 1)


def above(energy: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """Blocks with at least `alpha` (a number, or `[lists]`) of the largest energy of their tile: the paper's max
    threshold. No block is scored in the first tiles, where that is none."""
    alpha = torch.as_tensor(alpha, dtype=energy.dtype, device=energy.device)
    least = energy.amax(-1, keepdim=True) + alpha.log().view(-1, 1, 1)
    least = least.clamp(min=torch.finfo(energy.dtype).min)  # a block without energy is never chosen
    return (energy >= least) | (alpha.view(-1, 1, 1) <= 0)


def of_largest(energy: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` blocks of the largest energy in each tile."""
    places = energy.topk(min(count, energy.shape[-1])).indices
    return torch.zeros_like(energy, dtype=torch.bool).scatter(-1, places, True) & ~energy.isneginf()


def of_mass(energy: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest blocks that have `share` of a tile's energy together (top-p, as in FlexPrefill and XAttention)."""
    weights = energy.softmax(-1).nan_to_num(0.0)
    ordered, places = weights.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(energy, dtype=torch.bool).scatter(-1, places, before < share) & ~energy.isneginf()


def of_mean_queries(query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float) -> torch.Tensor:
    """Logits of each tile's mean query with the means of blocks, as FlexPrefill's query-aware heads score them."""
    middle = means(keys, layout.size).float()
    grouped = query.float().view(len(keys), -1, layout.tokens, query.shape[-1])
    found = []
    for first, last in layout.spans():
        tile = grouped[:, :, first:last].mean(2)
        tile = tile if layout.group == 1 else tile.mean(1, keepdim=True)
        found.append((tile @ middle.transpose(-1, -2) * scale).flatten(0, 1))
    return torch.stack(found, 1).masked_fill(~layout.causal().to(query.device), -torch.inf)


def of_antidiagonals(
    query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float, stride: int = 8
) -> torch.Tensor:
    """Logarithm of blocks' shares of attention estimated from every `stride`-th antidiagonal, as XAttention does."""
    group = len(query) // len(keys)
    entries = -(-layout.entries // stride) * stride
    lead = layout.place % stride
    query = F.pad(query.float(), (0, 0, lead, entries - layout.entries))
    keys = F.pad(keys.float(), (0, 0, 0, entries - layout.entries)).repeat_interleave(group, 0)
    # One row stands for `stride` queries, in reverse order, one column for as many keys.
    rows = query.unflatten(1, (-1, stride)).flip(2).flatten(2)
    columns = keys.unflatten(1, (-1, stride)).flatten(2)
    logits = rows @ columns.transpose(-1, -2) * (scale / stride)
    turn = (layout.place - lead) // stride + torch.arange(logits.shape[1], device=query.device)
    hidden = torch.arange(logits.shape[2], device=query.device) > turn[:, None]
    shares = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    shares = F.pad(shares, (0, -shares.shape[2] % (layout.size // stride)))
    shares = shares.unflatten(2, (-1, layout.size // stride)).sum(3)
    found = []
    for first, last in layout.spans():
        tile = shares[:, (lead + first) // stride : (lead + last - 1) // stride + 1].sum(1)
        found.append(tile if layout.group == 1 else tile.view(len(keys) // group, group, -1).sum(1))
    return torch.stack(found, 1).log()


def at_random(like: torch.Tensor, layout: Layout, seed: int = 0) -> torch.Tensor:
    """As many blocks in each tile as `like` `[lists, tiles, blocks]` has: the forced ones, and others at random."""
    forced = layout.forced()
    generator = torch.Generator("cpu").manual_seed(seed)
    draw = (
        torch.rand(like.shape, generator=generator, device="cpu")
        .masked_fill(forced, 2.0)
        .masked_fill(~layout.causal(), -1.0)
    )
    order = draw.argsort(-1, descending=True).argsort(-1)
    return ((order < like.cpu().sum(-1, keepdim=True)) & layout.causal()).to(like.device)


def with_forced(selected: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A selection with the blocks that every tile attends to, and without those that it cannot see."""
    return (selected | layout.forced().to(selected.device)) & layout.causal().to(selected.device)
