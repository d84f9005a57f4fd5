"""lissom itself: native decode through its own loop, through `model.generate()`, or behind a compacted cache.

Settings: `model`, `through` (`loop` or `generate`), `threads`, and either `recipe` (the fields of a `Recipe`) or
`weights`, `kv` and `activations` (see `NativeDecode`) and `ratio` (of the cache to keep, 1 for all of it).
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
from lissom.kernels.packed_layers import PackedLinear
from lissom.kv import AttentionMatching
from lissom.recipes import Recipe


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


def _native(settings: dict[str, Any]) -> Recipe:
    methods: list[Any] = [NativeDecode(**{name: settings[name] for name in ("weights", "kv", "activations")})]
    if settings["ratio"] < 1:
        # The cheapest queries: only the steps behind the compacted cache are of interest.
        methods.append(AttentionMatching(ratio=settings["ratio"], queries="context"))
    return Recipe.of(*methods, model=settings["model"], dtype="float32", weights="packed")


class Runtime:
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._through = settings["through"]
        recipe = (
            Recipe(**settings["recipe"] | {"model": settings["model"]}) if "recipe" in settings else _native(settings)
        )
        self._model, _ = recipe.load_model()
        self._inside = ExitStack()
        self._inside.enter_context(recipe.running(self._model))
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
