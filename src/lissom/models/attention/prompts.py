"""Methods that compute the attention of a prompt's tokens themselves, and what such a prompt has in place of a mask."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, Self, TypeGuard

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

logger = logging.getLogger(__name__)


class NativeReading(Protocol):
    """How a method has native passes read one prompt, stretch by stretch."""

    def edges(self, tokens: int, entries: int, most: int) -> list[int]:
        """Where the stretches of a prompt's `tokens`, the last of `entries`, begin, and where the last one ends; each
        has about `most` at most."""
        ...

    def begin(self, tokens: int, entries: int, following: int) -> Any:
        """What native passes are told of a stretch: an array of `lissom.kernels.sparse_attention.Sparse`, one for each
        layer.

        Args:
            tokens: of the stretch, the last of `entries`.
            following: tokens of the prompt behind the stretch.
        """
        ...

    def end(self) -> None:
        """The stretch has been read."""
        ...


class NotNatively(Exception):
    """Native passes cannot compute what a method does; says why."""


class PromptAttention(Protocol):
    """A method that computes the attention of a prompt's tokens itself."""

    def natively(
        self, model: PreTrainedModel, tokens: int, entries: int, padding: list[int], whole: list[bool]
    ) -> NativeReading | None:
        """For `tokens` of a prompt, the last of `entries`; None where it is read densely.

        Args:
            padding: see `attend`.
            whole: of each layer, whether its cache has everything that was read.

        Raises:
            NotNatively: native passes cannot compute it.
        """
        ...

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: list[int],
        scaling: float,
    ) -> torch.Tensor | None:
        """Causal attention of `query` `[rows, query heads, tokens, head_dim]`, whose tokens are the last of `key` and
        `value` `[rows, KV heads, entries, head_dim]`; None where the method leaves it to others.

        Args:
            module: the attention layer.
            padding: of each row, how many entries at the beginning are padding.
        """
        ...

    def stays_dense(self, reason: str) -> None:
        """Told where it was left out, or left something out itself."""
        ...


WINDOWS = "in layers with a sliding window"
MASK = "the mask is more than causal with padding at the beginning (packed sequences, say, or padding elsewhere)"


def leave_dense(method: PromptAttention, reason: str) -> None:
    """A prompt, or a layer's part of it, is not read by `method`; for each reason this is logged once."""
    method.stays_dense(reason)
    _say(reason)


@cache
def _say(reason: str) -> None:
    logger.warning("Prompts are read with dense attention: %s.", reason)


@dataclass(frozen=True)
class Stretch:
    """What takes the place of the mask of a prompt whose tokens see all before them but padding at the beginning.

    Attributes:
        padding: of each row, how many entries at the beginning are padding.
        entries: keys that there are; a static cache has room for more behind them.
    """

    padding: list[int]
    entries: int

    @staticmethod
    def tensor(padding: torch.Tensor, entries: int) -> torch.Tensor:
        """As models pass masks around: `[rows, 1, 1, 2]`."""
        return torch.stack([padding, torch.full_like(padding, entries)], 1)[:, None, None]

    @staticmethod
    def has(mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
        """Whether `mask` is one of `tensor`."""
        return mask is not None and mask.dtype == torch.int64 and mask.ndim == 4 and mask.shape[2:] == (1, 2)

    @classmethod
    def of(cls, mask: torch.Tensor) -> Self:
        numbers = mask[:, 0, 0].tolist()
        return cls([padding for padding, _ in numbers], numbers[0][1])

    def visible(self, tokens: int, keys: int, device: torch.device) -> torch.Tensor:
        """bool `[rows, 1, tokens, keys]`."""
        place = torch.arange(self.entries - tokens, self.entries, device=device)[:, None]
        key = torch.arange(keys, device=device)
        start = torch.tensor(self.padding, device=device).view(-1, 1, 1, 1)
        # A query of padding sees itself, so that no row of the softmax is empty.
        return (key <= place) & ((key >= start) | (key == place))

    def mask(self, query: torch.Tensor, keys: int, added: bool) -> torch.Tensor | None:
        """For an attention function: None where its flag for causal attention says the same, and, where it is `added`
        to the logits, in their dtype."""
        tokens = query.shape[2]
        if tokens == keys == self.entries and not any(self.padding) and not added:
            return None
        visible = self.visible(tokens, keys, query.device)
        if not added:
            return visible
        return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)


def mask_through(fallback: Callable[..., Any]) -> Callable[..., Any]:
    @torch.compiler.disable  # numbers in masks decide
    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | torch.Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        device: torch.device | str = "cpu",
        **kwargs: Any,
    ) -> torch.Tensor | None:
        plain = mask_function is causal_mask_function and local_size is None and allow_is_causal_skip
        if plain and q_length > 1 and kv_offset == 0:
            entries = int(q_offset) + q_length
            padding = torch.zeros(batch_size, dtype=torch.int64, device=device)
            if attention_mask is not None:
                shown = attention_mask[:, :entries].bool()
                padding = (~shown).long().cumprod(1).sum(1)
                # Padding elsewhere is for the fallback.
                plain = bool((shown.sum(1) + padding == entries).all())
            if plain and entries <= kv_length:
                return Stretch.tensor(padding.to(device), entries)
        return fallback(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            device=device,
            **kwargs,
        )

    return mask
