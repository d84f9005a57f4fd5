"""What a policy makes of a prompt: the mean of its last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from lissom.rl.hidden import read_states
from lissom.rl.sampling import pad_of, prompt_ids
from lissom.rl.tasks.task import Prompt


def features_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], batch_size: int = 64
) -> np.ndarray:
    """Mean of the last hidden states of each prompt's tokens, float64 `[prompts, hidden]`.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
    """
    read = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    found = []
    for states, mask in read_states(model, read, pad_of(tokenizer), batch_size):
        weights = mask[..., None].double()
        found.append(((states.double() * weights).sum(1) / weights.sum(1)).cpu().numpy())
    return np.concatenate(found)
