"""transformers as it is: SDPA, a growing `DynamicCache`, and a plain loop that asks for the last token's logits only.

Settings: `folder`, `dtype` (a torch dtype's name), `threads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


class Runtime:
    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(
            settings["folder"], dtype=getattr(torch, settings["dtype"]), attn_implementation="sdpa"
        ).eval()
        self.facts = {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.no_grad()
    def generate(self, ids: list[int], capacity: int, emit: Callable[[int], None]) -> None:
        cache, new = DynamicCache(config=self._model.config), torch.tensor([ids])
        while True:
            logits = self._model(new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            new = logits[:, -1].argmax(-1, keepdim=True)
            emit(int(new))
