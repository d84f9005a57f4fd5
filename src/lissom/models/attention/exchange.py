"""Which attention function a model has, and why: installed caches and methods for prompts, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from lissom.errors import UserError
from lissom.models.attention.functions import attention_through
from lissom.models.attention.prompts import PromptAttention, mask_through

PREFIX = "lissom_"
_lock = Lock()

# Of attention layers, the methods of the blocks that they are in; of names of implementations, what counts outside.
_methods: WeakKeyDictionary[torch.nn.Module, list[PromptAttention]] = WeakKeyDictionary()
_defaults: dict[str, Callable[[], PromptAttention]] = {}


def _method_of(module: torch.nn.Module) -> PromptAttention | None:
    methods = _methods.get(module)
    return methods[-1] if methods else None


# By what a model had: the function that it had, ours for models with caches that attend themselves, and ours for models
# in blocks of methods for prompts. A copy that is made inside a block keeps the name and is in none: it is dense.
_FALLBACKS: dict[str, Callable[..., Any] | None] = {"sdpa": sdpa_attention_forward, "eager": None}
_READING = {base: f"{PREFIX}{base}" for base in _FALLBACKS}
_PROMPTS = {base: f"{PREFIX}prompts_{base}" for base in _FALLBACKS}
_BASES = {name: base for names in (_READING, _PROMPTS) for base, name in names.items()}
for _base, _function in _FALLBACKS.items():
    _mask = ALL_MASK_ATTENTION_FUNCTIONS[_base]
    AttentionInterface.register(_READING[_base], attention_through(_function, lambda module: None))
    AttentionMaskInterface.register(_READING[_base], _mask)
    AttentionInterface.register(_PROMPTS[_base], attention_through(_function, _method_of))
    AttentionMaskInterface.register(_PROMPTS[_base], mask_through(_mask))


def register_prompt_attention(key: str, default: Callable[[], PromptAttention]) -> None:
    """Make `lissom_<key>` an attention implementation of transformers in which a method computes what prompts attend
    to, and SDPA the rest: the one of the block of `prompt_attention` that a model is in, or else `default()`, which is
    made once. Compacted caches are read, too."""
    name, method = PREFIX + key, cache(default)
    _defaults[name] = method
    AttentionInterface.register(name, attention_through(sdpa_attention_forward, lambda m: _method_of(m) or method()))
    AttentionMaskInterface.register(name, mask_through(ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]))


@dataclass
class _Exchange:
    """Why a model has another attention implementation than its own.

    Attributes:
        own: what it had.
        readers: blocks of `installed` that it is in.
        kept: whether `install` was called, so that no block takes it back.
        prompts: methods for prompts; the last one counts.
    """

    own: str
    readers: int = 0
    kept: bool = False
    prompts: list[PromptAttention] = field(default_factory=list)

    @property
    def base(self) -> str:
        """What computes that which nothing of ours does; a name of ours may have been there before."""
        return _BASES.get(self.own, self.own)

    @property
    def is_needed(self) -> bool:
        """Whether the model's own will not do."""
        return bool(self.prompts or self.readers or self.kept)

    @property
    def wanted(self) -> str:
        if self.own in _defaults:  # which does all that the others do
            return self.own
        if self.prompts:
            return _PROMPTS.get(self.base, self.base)
        return _READING.get(self.base, self.base) if self.is_needed else self.own


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
        if exchange.is_needed and exchange.wanted not in _BASES and exchange.wanted not in _defaults:
            raise UserError(
                f"attn_implementation={exchange.own!r} cannot read a compacted cache, nor prompts by a method. "
                "Load the model with attn_implementation='sdpa' or 'eager'."
            )
        if exchange.wanted != current:
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
        return exchange.prompts[-1]
    return _defaults[name]() if name in _defaults else None


@contextmanager
def prompt_attention(model: PreTrainedModel, method: PromptAttention) -> Iterator[None]:
    """Inside the block `method` computes what prompts of `model` attend to.

    Raises:
        UserError: see `install`.
    """
    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
    with _exchanging(model) as exchange:
        exchange.prompts.append(method)
    for layer in layers:
        _methods.setdefault(layer, []).append(method)
    try:
        yield
    finally:
        for layer in layers:
            _methods[layer].remove(method)
        with _exchanging(model) as exchange:
            if method in exchange.prompts:
                exchange.prompts.remove(method)
