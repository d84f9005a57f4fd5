"""FlashPrefill inside running models: through transformers' attention functions, and in native passes."""

from __future__ import annotations

import logging
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
from lissom.kernels.blocks import TILE
from lissom.kernels.sparse_attention import Sparse
from lissom.models import describe_decoder
from lissom.models.attention import NotNatively, prompt_attention, say_dense

if TYPE_CHECKING:
    from lissom.attention.flash_prefill.config import FlashPrefill

logger = logging.getLogger(__name__)


class Running:
    """The method in one model; see `lissom.models.attention.PromptAttention`."""

    def __init__(self, settings: FlashPrefill, model: PreTrainedModel | None = None) -> None:
        self.settings, self.report = settings, Report()
        self._alphas = None if model is None else self._of(model)

    def _of(self, model: PreTrainedModel) -> torch.Tensor:
        info = describe_decoder(model)
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
            say_dense("gradients are wanted")
            return None
        if key.shape != value.shape:
            say_dense("keys and values have different sizes")
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
        for row, pad in enumerate(padding):
            real = min(query.shape[2], entries - pad)
            if not real:
                continue
            report.count(found.selected[row], rules.layout(real, entries - pad, shape[0] // shape[1]))
            if settings.estimate:
                report.drop(found.dropped[row, :, -real:])
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
        alphas = self._of(model) if self._alphas is None else self._alphas
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
            return False
        if settings.min_tokens != "auto":
            return entries >= settings.min_tokens
        rules, shape = settings.rules(), (heads, kv_heads, head_dim)
        if entries < first_sparse(rules):
            return False
        alpha = 0.1 if self._alphas is None else round(float(self._alphas.mean()), 3)
        return entries >= crossover(shape, dtype, device, rules, alpha, settings.precision, natively)


class NativeStretches:
    """One prompt in native passes; see `lissom.models.attention.NativeReading`."""

    def __init__(
        self, running: Running, alphas: torch.Tensor, kv_heads: int, padding: list[int], whole: list[bool]
    ) -> None:
        """`alphas`: `[layers, query heads]`."""
        self._report, self._rules, self._estimate = running.report, running.settings.rules(), running.settings.estimate
        self._alphas, self._kv_heads, self._padding, self._whole = alphas.contiguous(), kv_heads, padding, whole

    def begin(self, rows: int, tokens: int, entries: int, following: int) -> Any:
        """See `lissom.models.attention.NativeReading`."""
        layers, heads = self._alphas.shape
        rules = self._rules = replace(self._rules, following=following)
        self._padded = [min(pad, entries) for pad in self._padding]
        self._tokens, self._entries = tokens, entries
        extents = rules.extents(tokens, entries, self._padded, heads // self._kv_heads)
        lists = self._kv_heads if rules.shared else heads
        self._selected = torch.zeros(layers, rows, lists, *extents, dtype=torch.bool, device="cpu")
        dropped = (layers, rows, heads, tokens) if self._estimate else (layers, 0)
        self._dropped = torch.zeros(dropped, dtype=torch.float32, device="cpu")
        self._seconds = torch.zeros(layers, 2, dtype=torch.float32, device="cpu")
        return (Sparse * layers)(*(self._told(layer, extents) for layer in range(layers)))

    def _told(self, layer: int, extents: tuple[int, int]) -> Sparse:
        dropped = self._dropped[layer].data_ptr() if self._estimate else None
        numbers = self._rules.numbers()
        if not self._whole[layer]:
            numbers[1] = 0  # no blocks: dense
        parts = self._alphas[layer], self._selected[layer], self._seconds[layer]
        alpha, selected, seconds = (part.data_ptr() for part in parts)
        return Sparse(alpha, selected, dropped, seconds, *numbers, *extents)

    def end(self) -> None:
        """See `lissom.models.attention.NativeReading`."""
        group = self._alphas.shape[1] // self._kv_heads
        read = self._selected.flatten(1).any(1).tolist()  # layers with a window, say, have no blocks
        for layer, selected in enumerate(self._selected):
            if not read[layer]:
                continue
            report = self._report.layer(layer)
            choosing, attending = self._seconds[layer].tolist()
            report.seconds += choosing + attending
            report.choosing += choosing
            for row, pad in enumerate(self._padded):
                real = min(self._tokens, self._entries - pad)
                if real > 0:
                    report.count(selected[row], self._rules.layout(real, self._entries - pad, group))
                    if self._estimate:
                        report.drop(self._dropped[layer, row, :, -real:])


@contextmanager
def applied(settings: FlashPrefill, model: PreTrainedModel) -> Iterator[Report]:
    """`settings` in `model` for the length of a block."""
    running, info = Running(settings, model), describe_decoder(model)
    if any(info.sliding):
        logger.warning("%d of %d layers have a sliding window: they stay dense.", sum(info.sliding), len(info.sliding))
    with prompt_attention(model, running):
        yield running.report
