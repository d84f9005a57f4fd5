"""Compaction inside `generate`: as soon as a prompt has been read, its cache is compacted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from lissom.errors import UserError
from lissom.kv.cache import CompactLayer, Observer, compact_layers, exchange_layers, require_full_attention
from lissom.kv.compact import fit, recorder_for, study
from lissom.kv.compactor import Compactor
from lissom.kv.harvest import in_own_pass
from lissom.models.attention import installed
from lissom.models.calls import argument

_ARGUMENTS = ("past_key_values", "input_ids", "attention_mask")


def _both(first: Observer | None, second: Observer) -> Observer:
    if first is None:
        return second

    def observe(layer: CompactLayer, query: torch.Tensor, scaling: float, begin: int) -> None:
        first(layer, query, scaling, begin)
        second(layer, query, scaling, begin)

    return observe


@contextmanager
def compacted_after_prefill(model: PreTrainedModel, method: Compactor) -> Iterator[None]:
    """Inside the block a prompt of at least `method.min_tokens` is compacted after its forward pass.

    Where the method's queries come from a repeat pass, the prompt is read once more before the first token.
    """
    if "self-study" in method.queries:
        raise UserError("Self-study needs the tokenizer: call lissom.compact, or use queries='repeat' or 'context'.")
    require_full_attention(model)
    states = threading.local()  # several threads may generate at once

    def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if in_own_pass():
            return
        states.pending = None
        cache, ids, mask = (argument(module, name, args, kwargs) for name in _ARGUMENTS)
        if cache is not None and ids is None and cache.get_seq_length() == 0:
            raise UserError("A prompt of embeddings cannot be compacted: give token ids.")
        if cache is None or ids is None or cache.get_seq_length() > 0 or ids.shape[1] < method.min_tokens:
            return
        if not isinstance(cache, DynamicCache):
            raise UserError(f"{type(cache).__name__} cannot be compacted: generate with the default (dynamic) cache.")
        exchange_layers(cache, model)
        visible = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            visible = mask[:, -ids.shape[1] :].bool()
        recorder = recorder_for(model, method)
        if method.queries == "context":
            recorder.expect(0, visible)
            for _, layer in compact_layers(cache):
                layer.observer = _both(layer.observer, recorder.observe)  # another method may be recording, too
        states.pending = cache, ids, visible, recorder

    def after(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # A pass may have begun before this block was entered.
        if in_own_pass() or getattr(states, "pending", None) is None:
            return
        cache, ids, visible, recorder = states.pending
        states.pending = None
        for _, layer in compact_layers(cache):
            layer.observer, layer.in_order = None, False
        with torch.no_grad():
            study(model, cache, ids, visible, method, recorder)
            if not method.on_policy:
                fit(cache, method, recorder)

    with installed(model):
        hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
