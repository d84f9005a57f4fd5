"""How a prompt is cut into tiles of queries and blocks of entries, and which blocks its tiles meet in any case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch

SCORINGS = ("given", "flashprefill", "row-normalised")
SIZES = (64, 128)  # blocks that the kernels are made for
TILE = 128  # queries that have a list of blocks together


@dataclass(frozen=True)
class Rules:
    """How blocks are chosen.

    Attributes:
        scoring: one of `SCORINGS`; `given` takes them from the caller.
        size: entries of a block; the native kernel and Triton know `SIZES`, and in native passes 0 is dense.
        sink, window: first and latest blocks that are always met; the latest are at least a tile's own.
        last: tiles at the end of the prompt that meet everything.
        shared: whether the query heads of a KV head, and a tile's queries of all of them, have one list.
        corrected: whether a block that is left out counts as its mean, as many times as it has entries.
        following: tokens of the prompt that will be read later.
    """

    scoring: str = "flashprefill"
    size: int = 128
    sink: int = 2
    window: int = 4
    last: int = 2
    shared: bool = False
    corrected: bool = False
    following: int = 0

    def given(self) -> Self:
        """The same, but for the blocks, which the caller chooses."""
        return replace(self, scoring="given")

    def numbers(self) -> list[int]:
        """In the order of the native struct."""
        scoring = SCORINGS.index(self.scoring)
        shared, corrected = int(self.shared), int(self.corrected)
        return [scoring, self.size, self.sink, self.window, self.last, shared, corrected, self.following]

    def wide(self, group: int) -> int:
        """Tokens of a tile, where `group` query heads share a KV head."""
        return max(1, TILE // group) if self.shared else TILE

    def layout(self, tokens: int, entries: int, group: int) -> Layout:
        """Of one sequence, where `group` query heads share a KV head."""
        return Layout(self, tokens, entries, group if self.shared else 1)

    def selection(
        self, heads: int, kv_heads: int, tokens: int, entries: int, padding: Sequence[int]
    ) -> tuple[int, int, int, int]:
        """Shape of a selection: rows, lists, and the most tiles and blocks that any row has."""
        rows = [self.layout(min(tokens, entries - p), entries - p, heads // kv_heads) for p in padding if p < entries]
        tiles, blocks = (max((getattr(row, what) for row in rows), default=1) for what in ("tiles", "blocks"))
        return len(padding), kv_heads if self.shared else heads, tiles, blocks


def edges(place: int, tokens: int, wide: int) -> list[int]:
    """Where `tokens`, the first of which is at `place`, are cut at multiples of `wide`: 0, the cuts and the end."""
    return [0, *range(wide - place % wide, tokens, wide), tokens]


@dataclass(frozen=True)
class Layout:
    """How one sequence is cut.

    Attributes:
        tokens: queries, at the end of the entries.
        entries: keys.
        group: query heads that have a list together: 1, or all of a KV head where lists are shared.
    """

    rules: Rules
    tokens: int
    entries: int
    group: int

    @property
    def size(self) -> int:
        """Keys of a block."""
        return self.rules.size

    @property
    def place(self) -> int:
        """Position of the first query."""
        return self.entries - self.tokens

    @property
    def wide(self) -> int:
        """Tokens of a tile."""
        return self.rules.wide(self.group)

    @property
    def tiles(self) -> int:
        """Number of tiles, parts at both ends included."""
        return (self.entries - 1) // self.wide - self.place // self.wide + 1

    @property
    def blocks(self) -> int:
        """Number of blocks, a part at the end included."""
        return -(-self.entries // self.size)

    def spans(self) -> list[tuple[int, int]]:
        """First token of each tile and the one behind its last."""
        return list(pairwise(edges(self.place, self.tokens, self.wide)))

    def causal(self) -> torch.Tensor:
        """`[tiles, blocks]`: whether a query of the tile sees a key of the block."""
        ends = torch.tensor([self.place + end - 1 for _, end in self.spans()], device="cpu")
        return torch.arange(self.blocks, device="cpu") <= (ends // self.size)[:, None]

    def density(self, selected: torch.Tensor) -> float:
        """Share of the causal blocks that `selected` `[lists, tiles, blocks]` has."""
        return int(selected.sum()) / (int(self.causal().sum()) * len(selected))

    def forced(self) -> torch.Tensor:
        """`[tiles, blocks]`: sinks, the window, and everything for the last tiles."""
        rules, block = self.rules, torch.arange(self.blocks, device="cpu")
        starts = torch.tensor([self.place + start for start, _ in self.spans()], device="cpu")
        near = block > (starts // self.size)[:, None] - max(1, rules.window)
        total = -(-(self.entries + rules.following) // self.wide)
        final = (starts // self.wide >= total - rules.last)[:, None]
        return ((block < rules.sink) | near | final) & self.causal()
