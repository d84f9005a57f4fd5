"""Attention of a prompt's tokens over chosen blocks of entries, in native code that also chooses them."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import NamedTuple

import torch

from lissom.kernels import native
from lissom.kernels.blocks import Rules
from lissom.kernels.ragged_attention import KV_TYPES, Attention, KeyValues


class Sparse(ctypes.Structure):
    """Mirror of `struct Sparse` in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("alpha", "selected", "dropped", "seconds")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *("scoring", "size", "sink", "window", "last", "shared", "corrected", "following", "tiles", "blocks"),
            )
        ),
    )


native.mirror(8, Sparse)


class SparseAttention(NamedTuple):
    """What `sparse_attention` gives.

    Attributes:
        output: `[rows, query heads, tokens, head_dim]`, in the dtype of the query; zero where a query is padding.
        lse: `[rows, query heads, tokens]`, the logarithm of the sum of e to the logits that were met, fp32 (float64 of
            float64, as all that follows).
        selected: bool `[rows, lists, tiles, blocks]`.
        dropped: fp32 `[rows, query heads, tokens]`, the estimated share of the attention that was left out; or empty.
        seconds: fp32 `[2]`, what choosing blocks and what attending took; or empty, where it was not measured.
    """

    output: torch.Tensor
    lse: torch.Tensor
    selected: torch.Tensor
    dropped: torch.Tensor
    seconds: torch.Tensor


def sparse_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rules: Rules,
    *,
    alpha: torch.Tensor,
    scale: float,
    padding: list[int] | None = None,
    selected: torch.Tensor | None = None,
    halves: bool = False,
    estimate: bool = False,
) -> SparseAttention:
    """Softmax attention of the last tokens of each row over blocks of its entries, causal, on the CPU.

    Args:
        query: `[rows, query heads, tokens, head_dim]`, of the last `tokens` entries.
        keys, values: `[rows, KV heads, entries, head_dim]`.
        alpha: fp32 `[query heads]`; shared lists take that of the first head of the group.
        scale: factor on query · key.
        padding: entries before the first real one, for each row.
        selected: bool `[rows, lists, tiles, blocks]` where `rules.scoring` is `given`.
        halves: whether fp32 keys and values may be rounded to bf16 where the processor multiplies those faster.
        estimate: whether `dropped` is wanted.

    Raises:
        MemoryError: there is not enough memory.
    """
    rows, heads, tokens, size = query.shape
    kv_heads, entries = keys.shape[1:3]
    vectors = query.transpose(1, 2).float().contiguous()
    keys, values = (part if part.dtype in KV_TYPES else part.float() for part in (keys, values))
    keys, values = keys.contiguous(), values.contiguous()
    output, lse = torch.empty_like(vectors), vectors.new_empty(rows, heads, tokens)
    dropped = torch.empty_like(lse) if estimate else lse.new_empty(0)
    seconds = lse.new_zeros(2)
    padding = padding or [0] * rows
    if selected is None:
        shape = rules.selection(heads, kv_heads, tokens, entries, padding)
        selected = torch.zeros(shape, dtype=torch.bool, device="cpu")
    selected = selected.contiguous()
    alpha = alpha.float().contiguous()
    starts = torch.arange(rows * kv_heads, device="cpu") * entries
    lengths = torch.full_like(starts, entries)
    store = KeyValues(
        *(keys.data_ptr(), values.data_ptr(), None, None, None, None, starts.data_ptr(), lengths.data_ptr()),
        *(KV_TYPES[keys.dtype], len(starts) * entries),
    )
    sparse = Sparse(
        *(alpha.data_ptr(), selected.data_ptr(), dropped.data_ptr() if estimate else None, seconds.data_ptr()),
        *(*rules.numbers(), *selected.shape[2:]),
    )
    holes = torch.tensor([[entries, entries - p] for p in padding], device="cpu")
    arguments = Attention(
        *(vectors.data_ptr(), output.data_ptr(), lse.data_ptr(), ctypes.addressof(sparse), ctypes.addressof(store)),
        *(None, holes.data_ptr() if any(padding) else None),
        *(rows, heads, kv_heads, tokens, size, 0, heads * size, heads * size, 0, int(halves), scale, 0.0),
    )
    native.call("ragged_attention", arguments)
    return SparseAttention(output.transpose(1, 2).to(query.dtype), lse, selected, dropped, seconds)


class SparseLayers:
    """How each layer of a model reads some tokens in native passes, and what came of it.

    Attributes:
        told: an array of `Sparse`, one for each layer, which points into the others.
        selected: bool `[layers, rows, lists, tiles, blocks]`; nothing where a layer was dense.
        dropped: fp32 `[layers, rows, query heads, tokens]`, or `[layers, 0]` without an estimate.
        seconds: fp32 `[layers, 2]`: of choosing and of attending.
    """

    def __init__(
        self,
        rules: Rules,
        alpha: torch.Tensor,
        kv_heads: int,
        tokens: int,
        entries: int,
        padding: list[int],
        sparse: list[bool],
        estimate: bool,
    ) -> None:
        """
        Args:
            alpha: fp32 `[layers, query heads]`, contiguous.
            tokens: that are read, the last of `entries`.
            padding: of each row, entries before the first real one.
            sparse: of each layer, whether it is; others are dense.
        """
        layers, heads = alpha.shape
        shape = rules.selection(heads, kv_heads, tokens, entries, padding)
        self._alpha = alpha  # lives as long as what points to it
        self.selected = torch.zeros(layers, *shape, dtype=torch.bool, device="cpu")
        dropped = (layers, len(padding), heads, tokens) if estimate else (layers, 0)
        self.dropped = torch.zeros(dropped, dtype=torch.float32, device="cpu")
        self.seconds = torch.zeros(layers, 2, dtype=torch.float32, device="cpu")
        parts = zip(alpha, self.selected, self.dropped, self.seconds, sparse, strict=True)
        self.told = (Sparse * layers)(
            *(
                Sparse(
                    *(a.data_ptr(), chosen.data_ptr(), out.data_ptr() if estimate else None, spent.data_ptr()),
                    *(*(rules if some else replace(rules, size=0)).numbers(), *shape[2:]),
                )
                for a, chosen, out, spent, some in parts
            )
        )
