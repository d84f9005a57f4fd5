"""What a policy makes of a prompt: the mean of its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lissom.rl.sampling import pad_of, padded_left, prompt_ids
from lissom.rl.tasks.task import Prompt


@torch.no_grad()
def features_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch_size: int = 64
) -> np.ndarray:
    """Mean of the last hidden states of each prompt's tokens, float64 `[prompts, hidden]`.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder: Any = base.get_decoder()
    read = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    device = next(base.parameters()).device
    training, found = model.training, []
    model.eval()
    for first in range(0, len(read), batch_size):
        ids, mask = padded_left(read[first : first + batch_size], pad_of(tokenizer), device)
        places = (mask.cumsum(1) - 1).clamp(min=0)  # padding has none
        states = decoder(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state.double()
        weights = mask[..., None].double()
        found.append(((states * weights).sum(1) / weights.sum(1)).cpu().numpy())
    model.train(training)
    return np.concatenate(found)
