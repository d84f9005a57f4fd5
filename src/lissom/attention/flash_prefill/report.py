"""What FlashPrefill did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from lissom.kernels.blocks import Layout, Rules


@dataclass
class LayerReport:
    """What one layer did with the prompts that it read sparsely.

    Attributes:
        blocks: blocks that were met, forced ones included, of `causal` that there are, over all heads.
        seconds: spent on choosing and attending.
        choosing: of these, spent on choosing blocks; NaN where it was not measured.
        dropped: estimated share of the attention that was left out, the mean over queries and heads; NaN unless
            `FlashPrefill.estimate` is set.
        queries: over which `dropped` is the mean.
    """

    blocks: int = 0
    causal: int = 0
    seconds: float = 0.0
    choosing: float = 0.0
    dropped: float = float("nan")
    queries: int = 0

    @property
    def density(self) -> float:
        """Share of the causal blocks that was attended to; 1 where nothing was read sparsely."""
        return self.blocks / self.causal if self.causal else 1.0

    def add(
        self,
        rules: Rules,
        tokens: int,
        entries: int,
        padding: Sequence[int],
        group: int,
        selected: torch.Tensor,
        dropped: torch.Tensor,
    ) -> None:
        """Add what a layer did: `tokens`, the last of `entries`, met `selected` `[rows, lists, tiles, blocks]` and left
        out `dropped` `[rows, query heads, tokens]`, which may be empty.

        Args:
            padding: of each row, entries before the first real one.
            group: query heads of a KV head.
        """
        for row, pad in enumerate(padding):
            if pad == entries:
                continue
            layout = rules.layout(min(tokens, entries - pad), entries - pad, group)
            self.blocks += int(selected[row, :, : layout.tiles, : layout.blocks].sum())
            self.causal += _causal(layout) * selected.shape[1]
            if dropped.numel():
                real = dropped[row, :, -layout.tokens :]
                before = self.dropped * self.queries if self.queries else 0.0
                self.queries += real.numel()
                self.dropped = (before + float(real.sum())) / self.queries


@lru_cache(maxsize=256)
def _causal(layout: Layout) -> int:
    """Blocks that there are."""
    return int(layout.causal().sum())


@dataclass
class Report:
    """What was read since the block was entered.

    Attributes:
        layers: of each layer that read something sparsely, by its index.
        dense: why something was read densely, in the order in which it was.
    """

    layers: dict[int, LayerReport] = field(default_factory=dict)
    dense: dict[str, None] = field(default_factory=dict)

    def summary(self) -> str:
        """In words."""
        why = f": {'; '.join(self.dense)}." if self.dense else "."
        if not self.layers:
            return "No prompt was read sparsely" + why
        met = f"The prompt's attention met {self.density:.1%} of its blocks and took {self.seconds:.3g} s."
        return f"{met} Dense{why}" if self.dense else met

    def layer(self, index: int) -> LayerReport:
        return self.layers.setdefault(index, LayerReport())

    @property
    def density(self) -> float:
        """Over all layers."""
        causal = sum(layer.causal for layer in self.layers.values())
        return sum(layer.blocks for layer in self.layers.values()) / causal if causal else 1.0

    @property
    def seconds(self) -> float:
        """Over all layers."""
        return sum(layer.seconds for layer in self.layers.values())

    @property
    def choosing(self) -> float:
        """Of these, spent on choosing blocks."""
        return sum(layer.choosing for layer in self.layers.values())

    @property
    def dropped(self) -> float:
        """The mean over all layers' queries."""
        queries = sum(layer.queries for layer in self.layers.values())
        total = sum(layer.dropped * layer.queries for layer in self.layers.values() if layer.queries)
        return total / queries if queries else float("nan")
