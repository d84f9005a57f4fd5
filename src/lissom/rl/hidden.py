"""A policy's last hidden states: what priors and critics read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lissom.rl.sampling import padded_left, positions_of


def hidden_states(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """`[rows, tokens, hidden]` of tokens that are padded on the left, with gradients.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
        ids, mask: `[rows, tokens]`.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    states: Tensor = base.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)
    ).last_hidden_state
    return states


@torch.no_grad()
def read_states(
    model: nn.Module, rows: Sequence[Sequence[int]], padding: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and mask of `batch_size` rows of tokens at a time, by the model as it is used."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            ids, mask = padded_left(rows[first : first + batch_size], padding, device)
            yield hidden_states(model, ids, mask), mask
    finally:
        model.train(training)
