"""The plug-in point by which a cache layer computes its own attention inside any model of transformers.

A cache layer whose storage is not one dense tensor returns an `AttentionHandle` from its `update`, and the attention
function that `install` registers through transformers' `AttentionInterface` hands the query to it. Every ordinary
cache goes, untouched, to the attention function that the model had before. For an attention function that does not
know handles, one becomes the dense tensor that it stands for, where there is such a tensor; where entries were
compacted the first operation fails with a clear sentence, so a bias is never silently dropped.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lissom.errors import UserError

PREFIX = "lissom_"
# How many blocks of `installed` a model is in.
_blocks: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
# Models that `install` was called for by itself, so that no block takes it back.
_kept: WeakSet[PreTrainedModel] = WeakSet()
_lock = Lock()
SUPPORTED = ("sdpa", "eager")


class Attends(Protocol):
    """A cache layer that reads its own storage."""

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, scaling: float, softcap: float | None
    ) -> torch.Tensor:
        """Attention of `query` `[batch, heads, queries, head_dim]`; the result has the same shape."""
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


def _attention_through(fallback: Callable[..., Any] | None) -> Callable[..., Any]:
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
        if not isinstance(key, AttentionHandle):
            function = fallback or sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
            if scaling is not None:
                kwargs["scaling"] = scaling
            return function(module, query, key, value, attention_mask, dropout=dropout, **kwargs)
        if kwargs.get("s_aux") is not None:
            raise UserError(f"{type(module).__name__} uses attention sinks, which a compacted cache cannot honour.")
        if attention_mask is not None:
            attention_mask = _visible(attention_mask)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        output = key.layer.attend(query, attention_mask, scale, kwargs.get("softcap"))
        return output.transpose(1, 2).contiguous(), None

    return attention


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


for _name, _function in (("sdpa", sdpa_attention_forward), ("eager", None)):
    AttentionInterface.register(PREFIX + _name, _attention_through(_function))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def argument(module: torch.nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a forward call gives for `name`, by keyword or by place; None where it gives nothing."""
    if name in kwargs:
        return kwargs[name]
    places = list(inspect.signature(module.forward).parameters)
    return args[places.index(name)] if name in places and places.index(name) < len(args) else None


def install(model: PreTrainedModel) -> None:
    """Let `model` read caches that compute their own attention; any other cache is handled exactly as before.

    It stays so until `uninstall`, also where this is called inside a block of `installed`.

    Raises:
        UserError: the model's attention implementation is neither `sdpa` nor `eager`, or cannot be exchanged.
    """
    _exchange(model)
    _kept.add(model)


def _exchange(model: PreTrainedModel) -> None:
    current = model.config._attn_implementation or "eager"
    if current.startswith(PREFIX):
        return
    if current not in SUPPORTED:
        raise UserError(
            f"attn_implementation={current!r} cannot read a compacted cache. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    model.set_attn_implementation(PREFIX + current)
    if not model.config._attn_implementation.startswith(PREFIX):
        raise UserError(f"{type(model).__name__} does not support exchanging its attention function.")


def uninstall(model: PreTrainedModel) -> None:
    """Give `model` back the attention implementation that `install` found."""
    _kept.discard(model)
    current = model.config._attn_implementation or ""
    if current.startswith(PREFIX):
        model.set_attn_implementation(current.removeprefix(PREFIX))


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """`install` for the length of a block; where it was installed already, it stays. Blocks may end in any order."""
    with _lock:
        blocks = _blocks.get(model, 0)
        own = blocks > 0 or not (model.config._attn_implementation or "").startswith(PREFIX)
        if own:
            _exchange(model)
            _blocks[model] = blocks + 1
    try:
        yield
    finally:
        if own:
            with _lock:
                _blocks[model] -= 1
                if not _blocks[model]:
                    del _blocks[model]
                    if model not in _kept:
                        uninstall(model)
