"""`torch.compile` around transformers' decode step with a static cache. The prompt is read uncompiled, as transformers
advises: compiling it would be done again for every length. Weights are frozen into the step, which lets the compiler
lay them out for its kernels; that is faster than without.

Settings: `folder`, `dtype` (a torch dtype's name), `threads`, `scratch` (a folder for what is compiled).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import transformers
from transformers import AutoModelForCausalLM, StaticCache


class Runtime:
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        inductor.freezing = True
        # Not the user's: a process that is ended while it compiles leaves broken files behind, which are used again.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(settings["scratch"]) / "torch.compile")
        self._model = AutoModelForCausalLM.from_pretrained(
            settings["folder"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
        ).eval()
        self._cache: StaticCache | None = None
        self._capacity = 0
        self.facts = {"transformers": transformers.__version__, "torch": torch.__version__}

    def _prepare(self, capacity: int) -> StaticCache:
        """An empty cache. The compiled step is bound to its tensors, so it is kept as long as it is large enough."""
        if self._cache is None or capacity != self._capacity:
            torch._dynamo.reset()
            self._cache, self._capacity = StaticCache(self._model.config, max_cache_len=capacity), capacity
            self._step = torch.compile(self._model, fullgraph=False)
        else:
            self._cache.reset()
        return self._cache

    @torch.no_grad()
    def generate(self, ids: list[int], capacity: int, emit: Callable[[int], None]) -> None:
        cache, new = self._prepare(capacity), torch.tensor([ids])
        places = torch.arange(len(ids))[None]
        run = self._model
        while True:
            logits = run(
                new, past_key_values=cache, position_ids=places, use_cache=True, logits_to_keep=1
            ).logits  # positions as tensors: a number would be compiled in
            new = logits[:, -1].argmax(-1, keepdim=True)
            emit(int(new))
            places, run = places[:, -1:] + 1, self._step
