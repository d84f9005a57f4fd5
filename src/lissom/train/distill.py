"""What a student is told by a teacher: distributions of the next token, and hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Mean NLL (nats per token) of `ids` `[rows, tokens]` but the first, by `logits` `[rows, tokens, vocabulary]`."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean over tokens of KL(teacher || student) in nats, times the square of the temperature.

    Args:
        student, teacher: logits `[rows, tokens, vocabulary]`.
    """
    ours, theirs = (F.log_softmax(logits.float().flatten(0, -2) / temperature, -1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def hidden_distance(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers and tokens of |student - teacher|² / mean |teacher|².

    Args:
        student, teacher: hidden states `[rows, tokens, hidden_size]` after each layer.
    """
    parts = [
        F.mse_loss(ours.float(), theirs.float()) / theirs.float().square().mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(parts).mean()
