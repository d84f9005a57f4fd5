"""Thresholds for each head or layer, chosen so that no more than a share of its attention is left out on some text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.attention.flash_prefill.crossover import first_sparse
from lissom.attention.flash_prefill.prefill import sparse_prefill
from lissom.errors import UserError
from lissom.models import describe_decoder
from lissom.models.attention import NotNatively, prompt_attention
from lissom.models.calibration import calibration_windows, tokenizer_of

if TYPE_CHECKING:
    from lissom.attention.flash_prefill.config import FlashPrefill

Each = Literal["head", "layer"]
GRID = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005, 0.0)  # of thresholds, 0 is dense


class Measuring:
    """Reads prompts densely, and tells what would be left out; see `lissom.models.attention.PromptAttention`.

    Attributes:
        rules: whose thresholds they are.
        dropped: fp64 `[thresholds, query heads]` of each layer, the sum over windows of the mean over tokens.
    """

    def __init__(self, settings: FlashPrefill) -> None:
        self._settings, self.rules = settings, replace(settings.rules(), corrected=False)
        self.dropped: dict[int, torch.Tensor] = {}

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
        if key.shape != value.shape:
            return None

        def attention(alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
            found = sparse_prefill(
                query, key, value, alpha=alpha, rules=self.rules, scale=scaling, padding=padding,
                precision=self._settings.precision,
            )  # fmt: skip
            return found.output, found.lse

        output, whole = attention(0.0)
        # What is met is e^lse of all that there is: the log-sum-exps say exactly what is left out.
        shares = [-torch.expm1((attention(alpha)[1] - whole).clamp(max=0)) for alpha in GRID[:-1]]
        shares.append(torch.zeros_like(whole))
        means = torch.stack([share.mean((0, 2)).double().cpu() for share in shares])
        layer = int(getattr(module, "layer_idx", 0))
        self.dropped[layer] = self.dropped.get(layer, 0) + means
        return output

    def natively(
        self, model: PreTrainedModel, tokens: int, entries: int, padding: list[int], whole: list[bool]
    ) -> None:
        """See `PromptAttention.natively`."""
        raise NotNatively("thresholds are being chosen")

    def stays_dense(self, reason: str) -> None:
        """See `PromptAttention.stays_dense`; such layers have no thresholds."""


def chosen(dropped: torch.Tensor, budget: float) -> list[float]:
    """Of each column of `dropped` `[thresholds, any]` the largest threshold of `GRID` that leaves out at most
    `budget`; what is left out need not grow with the threshold, so it holds for all smaller ones, too."""
    within = (dropped <= budget).flip(0).int().cumprod(0).flip(0).bool()
    return [GRID[int(column.int().argmax())] for column in within.T]


@torch.no_grad()
def calibrated(
    settings: FlashPrefill,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    budget: float,
    each: Each,
    tokens: int,
    length: int,
    text: str | Path | None,
    progress: Callable[[int, int], None],
) -> list[float] | list[list[float]]:
    """See `FlashPrefill.calibrated`; the value of `alpha`."""
    if not 0 < budget < 1:
        raise UserError(f"budget={budget} is not in (0, 1): it is a share of the attention.")
    if each not in ("head", "layer"):
        raise UserError(f"each={each!r}: expected head or layer.")
    if not settings.scored or settings.selection == "forced":
        raise UserError(f"selection={settings.selection!r} has no threshold to choose.")
    info, measuring = describe_decoder(model), Measuring(settings)
    length, least = min(length, info.max_position_embeddings), first_sparse(measuring.rules)
    if length < least:
        raise UserError(f"length={length}: in prompts of fewer than {least} tokens there is nothing to leave out.")
    if tokens < length:
        raise UserError(f"tokens={tokens}: expected at least {length}, which is one prompt.")
    windows = calibration_windows(tokenizer or tokenizer_of(model), text, tokens, length)
    with prompt_attention(model, measuring):
        for done, window in enumerate(windows):
            progress(done, len(windows))
            model(input_ids=window[None].to(model.device), use_cache=False, logits_to_keep=1)
    progress(len(windows), len(windows))
    if not measuring.dropped:
        raise UserError("None of the model's layers can read prompts sparsely: there are no thresholds to choose.")
    heads, group = info.num_attention_heads, info.num_attention_heads // info.num_key_value_heads
    found = []
    for layer in range(info.num_hidden_layers):
        dropped = measuring.dropped.get(layer)
        if dropped is None:  # a window, say: dense in any case
            found.append([0.0] * heads)
        else:
            parts = _parts(dropped / len(windows), each, group if settings.shared else 1)
            found.append(chosen(parts, budget))
    return [alphas[0] for alphas in found] if each == "layer" else found


def _parts(dropped: torch.Tensor, each: Each, group: int) -> torch.Tensor:
    """`[thresholds, heads or 1]`, where heads with one list count as the one that loses most."""
    if group > 1:
        dropped = dropped.unflatten(1, (-1, group)).amax(2, keepdim=True).expand(-1, -1, group).flatten(1)
    return dropped if each == "head" else dropped.mean(1, keepdim=True)
