"""FlashPrefill inside running models, through transformers' attention functions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from lissom.attention.flash_prefill.prefill import Precision, layout_of, sparse_prefill
from lissom.attention.flash_prefill.selection import Layout
from lissom.kernels.sparse_attention import Rules
from lissom.models import describe_decoder
from lissom.models.attention import prompt_attention, register_prompt_attention

if TYPE_CHECKING:
    from lissom.attention.flash_prefill.config import FlashPrefill

logger = logging.getLogger(__name__)
KEY = "sparse_prefill"  # transformers takes every name with "flash" in it for one of FlashAttention
_LONGEST_TRIED = 16384  # tokens for which dense attention is compared


@dataclass
class LayerReport:
    """What one layer did with the prompts that it read sparsely.

    Attributes:
        blocks: blocks that were met, forced ones included, of `causal` that there are, over all heads.
        seconds: spent on choosing and attending.
        dropped: estimated share of the attention that was left out, the mean over queries and heads; NaN unless
            `FlashPrefill.estimate` is set.
        queries: over which `dropped` is the mean.
    """

    blocks: int = 0
    causal: int = 0
    seconds: float = 0.0
    dropped: float = float("nan")
    queries: int = 0

    @property
    def density(self) -> float:
        """Share of the causal blocks that was attended to; 1 where nothing was read sparsely."""
        return self.blocks / self.causal if self.causal else 1.0

    def add(self, selected: torch.Tensor, layout: Layout, dropped: torch.Tensor | None, seconds: float) -> None:
        """One sequence: its selection `[lists, tiles, blocks]`, and `dropped` `[query heads, tokens]`."""
        causal = layout.causal()
        self.blocks += int((selected[:, : layout.tiles, : layout.blocks] & causal).sum())
        self.causal += int(causal.sum()) * len(selected)
        self.seconds += seconds
        if dropped is not None:
            before = self.dropped * self.queries if self.queries else 0.0
            self.queries += dropped.numel()
            self.dropped = (before + float(dropped.sum())) / self.queries


@dataclass
class Report:
    """Of each layer by its index, since the block was entered."""

    layers: dict[int, LayerReport] = field(default_factory=dict)

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
    def dropped(self) -> float:
        """The mean over all layers' queries."""
        queries = sum(layer.queries for layer in self.layers.values())
        total = sum(layer.dropped * layer.queries for layer in self.layers.values() if layer.queries)
        return total / queries if queries else float("nan")


class Running:
    """The method in one model; see `lissom.models.attention.PromptAttention`."""

    def __init__(self, settings: FlashPrefill, model: PreTrainedModel | None = None) -> None:
        self.settings, self.report = settings, Report()
        self._alphas: torch.Tensor | None = None
        if model is not None:
            info = describe_decoder(model)
            self._alphas = settings.alphas(info.num_hidden_layers, info.num_attention_heads)
        self._said: set[str] = set()

    def alphas(self, layer: int, heads: int) -> torch.Tensor:
        """`[heads]` of a layer."""
        if self._alphas is None:
            return self.settings.alphas(layer + 1, heads)[layer]
        return self._alphas[layer]

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: list[int],
        scaling: float,
    ) -> torch.Tensor | None:
        """See `PromptAttention.attend`."""
        settings = self.settings
        if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
            self._say("gradients are wanted")
            return None
        if key.shape != value.shape:
            self._say("keys and values have different sizes")
            return None
        if key.shape[2] < self._least(query, key):
            return None
        layer = int(getattr(module, "layer_idx", 0))
        rules, begun = settings.rules(), time.perf_counter()
        found = sparse_prefill(
            query, key, value, alpha=self.alphas(layer, query.shape[1]), rules=rules, scale=scaling, padding=padding,
            select=settings.select(), precision=settings.products, estimate=settings.estimate,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            seconds = (time.perf_counter() - begun) / len(query)
            group = query.shape[1] // key.shape[1]
            for row, pad in enumerate(padding):
                entries = key.shape[2] - pad
                layout = layout_of(rules, min(query.shape[2], entries), entries, group)
                dropped = found.dropped[row, :, -layout.tokens :] if settings.estimate else None
                self.report.layer(layer).add(found.selected[row], layout, dropped, seconds)
        return found.output

    def _least(self, query: torch.Tensor, key: torch.Tensor) -> int:
        settings = self.settings
        if settings.min_tokens != "auto":
            return settings.min_tokens
        rules = settings.rules()
        floor = first_sparse(rules)
        if key.shape[2] < floor or torch.compiler.is_compiling():
            return floor
        shape = query.shape[1], key.shape[1], query.shape[3]
        return crossover(*shape, query.dtype, str(query.device), rules, settings.products)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("Prompts are read with dense attention: %s.", reason)


@cache
def first_sparse(rules: Rules) -> int:
    """Tokens of the shortest prompt of whole blocks of which something can be left out."""
    tokens = rules.size
    while True:
        layout = layout_of(rules, tokens, tokens, 1)
        if not torch.equal(layout.forced(), layout.causal()):
            return tokens
        tokens += rules.size


@cache
def crossover(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str, rules: Rules, products: Precision
) -> int:
    """Tokens of the shortest prompt for which sparse attention can be faster than SDPA here: measured once on random
    numbers, with no more than what is always met."""
    tokens, generator = first_sparse(rules), torch.Generator().manual_seed(0)
    while tokens < _LONGEST_TRIED:
        shapes = [(1, count, tokens, head_dim) for count in (heads, kv_heads, kv_heads)]
        query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        dense = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        sparse = partial(sparse_prefill, query, key, value, alpha=2.0, rules=rules, precision=products)
        if min(_seconds(sparse) for _ in range(3)) < min(_seconds(dense) for _ in range(3)):
            return tokens
        tokens *= 2
    return tokens


def _seconds(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


_running: WeakKeyDictionary[nn.Module, list[Running]] = WeakKeyDictionary()


def _of(module: nn.Module) -> Running:
    """The method in the model that an attention layer belongs to; with default settings where the model was loaded with
    `attn_implementation="lissom_sparse_prefill"`."""
    if not _running.get(module):
        from lissom.attention.flash_prefill.config import FlashPrefill

        _running[module] = [Running(FlashPrefill())]
    return _running[module][-1]


register_prompt_attention(KEY, _of)


@contextmanager
def applied(settings: FlashPrefill, model: PreTrainedModel) -> Iterator[Report]:
    """`settings` in `model` for the length of a block."""
    running, info = Running(settings, model), describe_decoder(model)
    if any(info.sliding):
        logger.warning("%d of %d layers have a sliding window: they stay dense.", sum(info.sliding), len(info.sliding))
    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
    with prompt_attention(model, KEY):
        for layer in layers:
            _running.setdefault(layer, []).append(running)
        try:
            yield running.report
        finally:
            for layer in layers:
                _running[layer].remove(running)
