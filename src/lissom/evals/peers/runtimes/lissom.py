"""lissom itself: native decode through its own loop, through `model.generate()`, or behind a compacted cache.

Settings: `model`, `weights`, `kv` and `activations` (see `NativeDecode`), `through` (`loop` or `generate`), `ratio` (of
the cache to keep, 1 for all of it), `threads`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

import lissom
from lissom.decode import NativeDecode, generate_tokens
from lissom.kernels import native
from lissom.kv import AttentionMatching
from lissom.models.packed_layers import PackedLinear


@dataclass
class _Emit(BaseStreamer):
    """generate() hands a streamer the prompt first, then every token."""

    emit: Callable[[int], None]
    prompt_seen: bool = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen:
            self.emit(int(value))
        self.prompt_seen = True

    def end(self) -> None:
        pass


class Runtime:
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._through = settings["through"]
        self._model, _ = lissom.load(settings["model"], weights="packed")
        self._inside = ExitStack()
        native_decode = NativeDecode(**{name: settings[name] for name in ("weights", "kv", "activations")})
        self._inside.enter_context(native_decode(self._model))
        if settings["ratio"] < 1:
            # The cheapest queries: only the steps behind the compacted cache are of interest.
            method = AttentionMatching(ratio=settings["ratio"], queries="context")
            self._inside.enter_context(method(self._model))
        linears = [module for module in self._model.modules() if isinstance(module, PackedLinear)]
        self.facts = {
            "lissom": lissom.__version__,
            "kernels": native.status().isa,
            # What every step reads: all linears, the head among them, and no more than a row of the embedding.
            "weight bytes": sum(linear.packed.nbytes for linear in linears),
        }

    @torch.no_grad()
    def generate(self, ids: list[int], capacity: int, emit: Callable[[int], None]) -> None:
        prompt, most = torch.tensor([ids]), capacity - len(ids)
        if self._through == "loop":
            for token in generate_tokens(self._model, prompt, max_new_tokens=most, stop=()):
                emit(int(token))
            return
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=most,
            do_sample=False,
            # Looked for as ever, and never found: an answer that ends early would not be measured to its end.
            eos_token_id=self._model.config.vocab_size,
            pad_token_id=0,
            streamer=_Emit(emit),
        )
