"""Cache layers that compute their own attention, and what stands for their keys and values on the way to it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map_only

from lissom.errors import UserError


class Attends(Protocol):
    """A cache layer that reads its own storage."""

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
        prompt: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Attention of `query` `[batch, heads, queries, head_dim]`; the result has the same shape.

        Args:
            prompt: what computes it from (query, keys, values) where these are all that was read, or gives None.
        """
        ...

    def whole(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values `[batch, KV heads, tokens, head_dim]` of everything that the mask covers, if that is all."""
        ...


class AttentionHandle(torch.Tensor):
    """Stands for the keys (`part` 0) or values (1) of a layer between its `update` and the attention function."""

    layer: Attends
    part: int

    @staticmethod
    def of(layer: Attends, like: torch.Tensor) -> tuple[AttentionHandle, AttentionHandle]:
        """Those of the keys and of the values of `layer`, in the dtype of `like`."""
        handles = [torch.Tensor._make_subclass(AttentionHandle, like.new_empty(0)) for _ in range(2)]
        for part, handle in enumerate(handles):
            handle.layer, handle.part = layer, part
        return handles[0], handles[1]

    @cached_property
    def _dense(self) -> torch.Tensor:
        found = self.layer.whole()
        if found is None:
            raise UserError(
                "A compacted cache was given to an attention function that cannot read it. Use the cache with the "
                "model it was made for, with attn_implementation 'sdpa' or 'eager', after "
                "lissom.models.attention.install(model)."
            )
        return found[self.part].to(self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(getattr(func, "__self__", None), "__name__", "") in ("dtype", "device", "requires_grad"):
            return super().__torch_function__(func, types, args, kwargs or {})
        dense = tree_map_only(AttentionHandle, lambda handle: handle._dense, (args, kwargs or {}))
        return func(*dense[0], **dense[1])
