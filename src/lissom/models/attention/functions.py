"""The attention functions that transformers calls: cache layers, methods for prompts, or what the model had before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lissom.errors import UserError
from lissom.models.attention.handles import AttentionHandle
from lissom.models.attention.prompts import MASK, WINDOWS, PromptAttention, Stretch, leave_dense


def attention_through(
    fallback: Callable[..., Any] | None, prompt_of: Callable[[torch.nn.Module], PromptAttention | None]
) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if Stretch.has(attention_mask):
            return of_prompt(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        if query.shape[2] > 1 and not torch.compiler.is_compiling():
            of_other(module, attention_mask, **kwargs)
        return attend(module, query, key, value, attention_mask, None, scaling, dropout, **kwargs)

    def of_other(module: torch.nn.Module, attention_mask: torch.Tensor | None, **kwargs: Any) -> None:
        """What is read is no prompt whose tokens see all before them."""
        method = prompt_of(module)
        if method is None:
            return
        if not getattr(module, "is_causal", True):
            leave_dense(method, f"{type(module).__name__} is not causal")
        elif kwargs.get("sliding_window") or getattr(module, "sliding_window", None):
            leave_dense(method, WINDOWS)
        elif attention_mask is not None:
            leave_dense(method, MASK)

    # What is decided by numbers in the mask and by the blocks that a model is in cannot be compiled.
    @torch.compiler.disable
    def of_prompt(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        scaling: float | None,
        dropout: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        stretch, compute, method = Stretch.of(attention_mask), None, prompt_of(module)
        others = _others({"dropout": dropout} | kwargs)
        if method is not None and others:
            leave_dense(method, f"{type(module).__name__} has {others[0]}")
        elif method is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            compute = partial(method.attend, module, padding=stretch.padding, scaling=scale)
        if isinstance(key, AttentionHandle):
            padded = any(stretch.padding)
            mask = stretch.visible(query.shape[2], stretch.entries, query.device) if padded else None
            return attend(module, query, key, value, mask, compute, scaling, dropout, **kwargs)
        if compute is not None:
            output = compute(query, key[:, :, : stretch.entries], value[:, :, : stretch.entries])
            if output is not None:
                return output.transpose(1, 2).contiguous(), None
        mask = stretch.mask(query, key.shape[2], fallback is None)
        return attend(module, query, key, value, mask, None, scaling, dropout, **kwargs)

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None] | None,
        scaling: float | None,
        dropout: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(key, AttentionHandle):
            function = fallback or sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
            if scaling is not None:
                kwargs["scaling"] = scaling
            return function(module, query, key, value, mask, dropout=dropout, **kwargs)
        unknown = [name for name in _others(kwargs) if name not in ("softcap", "output_attentions")]
        if unknown:
            raise UserError(f"{type(module).__name__} has {unknown[0]}, which a compacted cache cannot honour.")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        visible = None if mask is None else _visible(mask)
        output = key.layer.attend(query, visible, scale, kwargs.get("softcap"), compute)
        return output.transpose(1, 2).contiguous(), None

    return attention


def _others(arguments: dict[str, Any]) -> list[str]:
    """What makes attention something else than a softmax of scaled products: what is known to, and any tensor that is
    not known not to."""
    known = {"position_ids", "cache_position"}
    found = [name for name in ("dropout", "softcap", "output_attentions") if arguments.get(name)]
    found += [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and name not in known]
    return ["attention sinks" if name == "s_aux" else name for name in found]


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """Where `mask` `[rows, 1, queries, keys]`, bool or added to the logits, lets a query see a key."""
    if mask.shape[1] != 1:
        raise UserError("A compacted cache cannot honour an attention mask that differs between heads.")
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    # Hidden keys have the dtype's lowest number, or -inf; whatever is far from both is a bias.
    if bool((~visible & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise UserError("A compacted cache cannot honour an attention mask that is more than visible or hidden.")
    return visible
