"""FlashPrefill inside running models: through transformers' attention functions, and in native passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lissom.attention.flash_prefill.crossover import crossover, first_sparse, now
from lissom.attention.flash_prefill.prefill import sparse_prefill
from lissom.attention.flash_prefill.report import Report
from lissom.kernels.blocks import TILE, edges
from lissom.kernels.sparse_attention import SparseLayers
from lissom.models import DecoderInfo, describe_decoder
from lissom.models.attention import WINDOWS, NotNatively, leave_dense, prompt_attention

if TYPE_CHECKING:
    from lissom.attention.flash_prefill.config import FlashPrefill


class Running:
    """The method in one model; see `lissom.models.attention.PromptAttention`."""

    def __init__(self, settings: FlashPrefill, info: DecoderInfo | None = None) -> None:
        self.settings, self.report = settings, Report()
        self._alphas = None if info is None else self._of(info)
        typical = settings.alphas(1, 1) if self._alphas is None else self._alphas
        self._alpha = round(float(typical.mean()), 3)  # by which it is measured whether sparse attention pays

    def _of(self, info: DecoderInfo) -> torch.Tensor:
        return self.settings.alphas(info.num_hidden_layers, info.num_attention_heads)

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
            leave_dense(self, "gradients are wanted")
            return None
        if key.shape != value.shape:
            leave_dense(self, "keys and values have different sizes")
            return None
        shape, entries = (query.shape[1], key.shape[1], query.shape[3]), key.shape[2]
        if not self._is_long(query.shape[2], entries, *shape, query.dtype, str(query.device), natively=False):
            return None
        layer, padding = int(getattr(module, "layer_idx", 0)), [min(pad, entries) for pad in padding]
        rules, alphas, begun = settings.rules(), self.alphas(layer, query.shape[1]), now(query)
        found = sparse_prefill(
            query, key, value, alpha=alphas, rules=rules, scale=scaling, padding=padding,
            select=settings.select(layer, alphas), precision=settings.precision, estimate=settings.estimate,
        )  # fmt: skip
        seconds, measured = now(query) - begun, found.seconds.tolist()
        report = self.report.layer(layer)
        report.seconds += seconds
        if not measured:  # in PyTorch or by Triton
            report.choosing = float("nan")
        else:  # controls choose before the kernel
            report.choosing += measured[0] if settings.scored else seconds - measured[1]
        report.add(rules, query.shape[2], entries, padding, shape[0] // shape[1], found.selected, found.dropped)
        return found.output

    def natively(
        self, model: PreTrainedModel, tokens: int, entries: int, padding: list[int], whole: list[bool]
    ) -> NativeStretches | None:
        """See `PromptAttention.natively`."""
        info = describe_decoder(model)
        shape = info.num_attention_heads, info.num_key_value_heads, info.head_dim
        if not self._is_long(tokens, entries, *shape, torch.float32, "cpu", natively=True):
            return None
        if not self.settings.scored:
            raise NotNatively(f"selection={self.settings.selection!r} is PyTorch's")
        if any(info.sliding):
            leave_dense(self, WINDOWS)
        alphas = self._of(info) if self._alphas is None else self._alphas
        return NativeStretches(self, alphas, info.num_key_value_heads, padding, whole)

    def _is_long(
        self,
        tokens: int,
        entries: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
        natively: bool,
    ) -> bool:
        settings = self.settings
        if tokens < min(TILE, entries):  # behind a prompt: there is little to save, and drafts are verified so
            if tokens > 1:
                self.stays_dense(f"calls of fewer than {TILE} tokens behind others")
            return False
        rules, shape = settings.rules(), (heads, kv_heads, head_dim)
        if settings.min_tokens != "auto":
            least = settings.min_tokens
        else:
            least = first_sparse(rules)  # for shorter ones nothing needs to be measured
            if entries >= least:
                least = crossover(shape, dtype, device, rules, self._alpha, settings.precision, natively)
        if entries < least:
            self.stays_dense(f"prompts of fewer than {least} tokens")
        return entries >= least

    def stays_dense(self, reason: str) -> None:
        """See `PromptAttention.stays_dense`."""
        self.report.dense[reason] = None


class NativeStretches:
    """One prompt in native passes; see `lissom.models.attention.NativeReading`."""

    def __init__(
        self, running: Running, alphas: torch.Tensor, kv_heads: int, padding: list[int], whole: list[bool]
    ) -> None:
        """`alphas`: `[layers, query heads]`."""
        self._report, self._rules, self._estimate = running.report, running.settings.rules(), running.settings.estimate
        self._alphas, self._kv_heads, self._padding, self._whole = alphas.contiguous(), kv_heads, padding, whole
        self._tile = self._rules.wide(alphas.shape[1] // kv_heads)
        if len({pad % self._tile for pad in padding}) > 1:  # no cut is one between tiles of all rows
            raise NotNatively(f"rows of sparse prompts begin at places that differ by no multiple of {self._tile}")

    def edges(self, tokens: int, entries: int, most: int) -> list[int]:
        """See `lissom.models.attention.NativeReading`: at tiles, which are chosen for by all their queries."""
        tile, place = self._tile, entries - tokens - self._padding[0]
        return edges(place % tile, tokens, max(tile, most // tile * tile))

    def begin(self, tokens: int, entries: int, following: int) -> Any:
        """See `lissom.models.attention.NativeReading`."""
        padding = [min(pad, entries) for pad in self._padding]
        rules = replace(self._rules, following=following)
        self._layers = SparseLayers(
            rules, self._alphas, self._kv_heads, tokens, entries, padding, self._whole, self._estimate
        )
        self._extent = rules, tokens, entries, padding, self._alphas.shape[1] // self._kv_heads
        return self._layers.told

    def end(self) -> None:
        """See `lissom.models.attention.NativeReading`."""
        layers = self._layers
        read = layers.selected.flatten(1).any(1).tolist()  # layers with a window, say, have no blocks
        for index in (index for index, sparse in enumerate(read) if sparse):
            report, (choosing, attending) = self._report.layer(index), layers.seconds[index].tolist()
            report.seconds += choosing + attending
            report.choosing += choosing
            report.add(*self._extent, layers.selected[index], layers.dropped[index])


@contextmanager
def applied(settings: FlashPrefill, model: PreTrainedModel) -> Iterator[Report]:
    """`settings` in `model` for the length of a block."""
    running = Running(settings, describe_decoder(model))
    if settings.dense_layers:
        running.stays_dense(f"in the first {settings.dense_layers} layers, as `dense_layers` says")
    with prompt_attention(model, running):
        yield running.report
