"""The plug-in point by which a cache layer computes its own attention inside any model of transformers.

A cache layer whose storage is not one dense tensor returns an `AttentionHandle` from its `update`, and the attention
function that `install` registers through transformers' `AttentionInterface` hands the query to it. Every ordinary
cache goes, untouched, to the attention function that the model had before. For an attention function that does not
know handles, one becomes the dense tensor that it stands for, where there is such a tensor; where entries were
compacted the first operation fails with a clear sentence, so a bias is never silently dropped.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from threading import Lock
from typing import Any, Protocol, Self, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from lissom.errors import UserError

logger = logging.getLogger(__name__)
PREFIX = "lissom_"
SUPPORTED = ("sdpa", "eager")
_lock = Lock()


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


class NativeReading(Protocol):
    """How a method has native passes read one prompt, stretch by stretch."""

    def begin(self, rows: int, tokens: int, entries: int, following: int) -> Any:
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


class PromptAttention(Protocol):
    """A method that computes the attention of a prompt's tokens itself."""

    @property
    def not_native(self) -> str:
        """Why native passes cannot compute it; empty where they can."""
        ...

    def natively(
        self, model: PreTrainedModel, entries: int, padding: list[int], whole: list[bool]
    ) -> NativeReading | None:
        """For a prompt whose last token is one of `entries`; None where it is read densely.

        Args:
            padding: see `attend`.
            whole: of each layer, whether its cache has everything that was read.
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


MASK = "the mask is more than causal with padding at the beginning (packed sequences, say, or padding elsewhere)"


@cache
def say_dense(reason: str) -> None:
    """That prompts are not read by the method of the block that the model is in, once for each reason."""
    logger.warning("Prompts are read with dense attention: %s.", reason)


def _attention_through(
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
        if _Stretch.has(attention_mask):
            return of_prompt(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
        prompt = attention_mask is not None and query.shape[2] > 1 and getattr(module, "sliding_window", None) is None
        if prompt and not torch.compiler.is_compiling() and prompt_of(module) is not None:
            say_dense(MASK)
        return attend(module, query, key, value, attention_mask, None, scaling, dropout, **kwargs)

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
        stretch, compute, method = _Stretch.of(attention_mask), None, prompt_of(module)
        others = {"dropout": dropout, "softcap": kwargs.get("softcap"), "attention sinks": kwargs.get("s_aux")}
        has = [name for name, value in others.items() if value is not None and (name != "dropout" or value)]
        if has:
            say_dense(f"{type(module).__name__} has {has[0]}")
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
        if kwargs.get("s_aux") is not None:
            raise UserError(f"{type(module).__name__} uses attention sinks, which a compacted cache cannot honour.")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        visible = None if mask is None else _visible(mask)
        output = key.layer.attend(query, visible, scale, kwargs.get("softcap"), compute)
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


@dataclass(frozen=True)
class _Stretch:
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
        return mask is not None and mask.dtype == torch.int64 and mask.ndim == 4

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


def _mask_through(fallback: Callable[..., Any]) -> Callable[..., Any]:
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
                return _Stretch.tensor(padding.to(device), entries)
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


_FALLBACKS: dict[str, Callable[..., Any] | None] = {"sdpa": sdpa_attention_forward, "eager": None}
for _name, _function in _FALLBACKS.items():
    AttentionInterface.register(PREFIX + _name, _attention_through(_function, lambda module: None))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


# Of attention layers, the methods of the blocks that they are in; and, by key, what counts outside of blocks.
_methods: WeakKeyDictionary[torch.nn.Module, list[PromptAttention]] = WeakKeyDictionary()
_defaults: dict[str, Callable[[], PromptAttention]] = {}


def register_prompt_attention(key: str, default: Callable[[], PromptAttention]) -> None:
    """Make `lissom_<key>` an attention implementation of transformers in which a method computes what prompts attend
    to, and SDPA the rest: the one of the block of `prompt_attention` that a model is in, or else `default()`, which is
    made once. Compacted caches are read, too."""
    _defaults[key] = cache(default)

    def of(module: torch.nn.Module) -> PromptAttention:
        methods = _methods.get(module)
        return methods[-1] if methods else _defaults[key]()

    for base, fallback in _FALLBACKS.items():
        name = _prompt_name(key, base)
        AttentionInterface.register(name, _attention_through(fallback, of))
        AttentionMaskInterface.register(name, _mask_through(ALL_MASK_ATTENTION_FUNCTIONS[base]))


def _prompt_name(key: str, base: str) -> str:
    return PREFIX + key if base == "sdpa" else f"{PREFIX}{key}_{base}"


def argument(module: torch.nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a forward call gives for `name`, by keyword or by place; None where it gives nothing."""
    if name in kwargs:
        return kwargs[name]
    places = list(inspect.signature(module.forward).parameters)
    return args[places.index(name)] if name in places and places.index(name) < len(args) else None


@dataclass
class _Exchange:
    """Why a model has another attention implementation than its own.

    Attributes:
        own: what it had.
        readers: blocks of `installed` that it is in.
        kept: whether `install` was called, so that no block takes it back.
        prompts: keys of the methods for prompts, and these; the last one counts.
    """

    own: str
    readers: int = 0
    kept: bool = False
    prompts: list[tuple[str, PromptAttention]] = field(default_factory=list)

    @property
    def wanted(self) -> str:
        if self.prompts and not self.own.startswith(PREFIX):
            return _prompt_name(self.prompts[-1][0], self.own)
        return PREFIX + self.own if (self.readers or self.kept) and not self.own.startswith(PREFIX) else self.own


_exchanges: WeakKeyDictionary[PreTrainedModel, _Exchange] = WeakKeyDictionary()


@contextmanager
def _exchanging(model: PreTrainedModel) -> Iterator[_Exchange]:
    """Change what is wanted of `model`; after an error all is as it was."""
    with _lock:
        current = model.config._attn_implementation or "eager"
        known = _exchanges.get(model)
        if known is None or known.wanted != current:  # or somebody else has set another one
            known = _Exchange(current)
        exchange = replace(known, prompts=list(known.prompts))
        yield exchange
        if exchange.wanted != current:
            if exchange.own not in SUPPORTED:
                raise UserError(
                    f"attn_implementation={exchange.own!r} cannot read a compacted cache. "
                    "Load the model with attn_implementation='sdpa' or 'eager'."
                )
            model.set_attn_implementation(exchange.wanted)
            if model.config._attn_implementation != exchange.wanted:
                raise UserError(f"{type(model).__name__} does not support exchanging its attention function.")
        _exchanges[model] = exchange


def install(model: PreTrainedModel) -> None:
    """Let `model` read caches that compute their own attention; any other cache is handled exactly as before.

    It stays so until `uninstall`, also where this is called inside a block of `installed`.

    Raises:
        UserError: the model's attention implementation is neither `sdpa` nor `eager`, or cannot be exchanged.
    """
    with _exchanging(model) as exchange:
        exchange.kept = True


def uninstall(model: PreTrainedModel) -> None:
    """Give `model` back the attention implementation that `install` found."""
    with _exchanging(model) as exchange:
        exchange.kept, exchange.readers = False, 0


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """`install` for the length of a block; where it was installed already, it stays. Blocks may end in any order."""
    with _exchanging(model) as exchange:
        exchange.readers += 1
    try:
        yield
    finally:
        with _exchanging(model) as exchange:
            exchange.readers = max(0, exchange.readers - 1)


def prompt_method(model: PreTrainedModel) -> PromptAttention | None:
    """What computes the attention of prompts in `model`: the method of the innermost block of `prompt_attention`, or
    that of the attention implementation with which it was loaded."""
    exchange, name = _exchanges.get(model), model.config._attn_implementation
    if exchange is not None and exchange.prompts:
        return exchange.prompts[-1][1]
    own = [key for key in _defaults if name in (_prompt_name(key, base) for base in SUPPORTED)]
    return _defaults[own[0]]() if own else None


@contextmanager
def prompt_attention(model: PreTrainedModel, key: str, method: PromptAttention) -> Iterator[None]:
    """Inside the block `method` computes what prompts of `model` attend to; `register_prompt_attention` knows `key`.

    Raises:
        UserError: see `install`.
    """
    layers, entry = [module for module in model.modules() if hasattr(module, "layer_idx")], (key, method)
    with _exchanging(model) as exchange:
        exchange.prompts.append(entry)
    for layer in layers:
        _methods.setdefault(layer, []).append(method)
    try:
        yield
    finally:
        for layer in layers:
            _methods[layer].remove(method)
        with _exchanging(model) as exchange:
            if entry in exchange.prompts:
                exchange.prompts.remove(entry)
