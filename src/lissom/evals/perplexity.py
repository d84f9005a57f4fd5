"""Negative log-likelihood of text: by strided windows, or behind a cache that has already read something."""

from __future__ import annotations

import copy

import torch
from transformers import Cache, PreTrainedModel


@torch.no_grad()
def window_nll(model: PreTrainedModel, ids: torch.Tensor, window: int = 1024, stride: int = 512) -> torch.Tensor:
    """NLL in nats of every token of `ids` `[tokens]` but the first, each with up to `window - 1` tokens before it.

    A window starts every `stride` tokens, and only tokens that no earlier window has scored count, so each token is
    scored once, with at least `window - stride` tokens of context after the first window. e^mean is the perplexity.

    Returns:
        fp32 `[tokens - 1]`.
    """
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"Expected at least two token ids in one dimension, got shape {tuple(ids.shape)}.")
    if not 1 <= stride < window:
        raise ValueError(f"stride={stride} must be at least 1 and less than window={window}.")
    pieces, scored = [], 1
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        piece = ids[start:end]
        logits = model(piece[None].to(model.device)).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, piece[1:].to(logits.device), reduction="none")
        pieces.append(losses[scored - start - 1 :])
        scored = end
        if end == len(ids):
            break
    return torch.cat(pieces)


@torch.no_grad()
def nll_behind(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """NLL in nats `[tokens - 1]` of `ids` `[1, tokens]` but the first, read behind `cache`, which stays as it is.

    With the text that follows a document it tells what a compaction costs there; with text that has nothing to do
    with the document, whether it does harm elsewhere (off-context).
    """
    logits = model(ids.to(model.device), past_key_values=copy.deepcopy(cache)).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="none")
