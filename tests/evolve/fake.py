"""A bench that measures nothing: figures follow from the recipe, so the search can be tested by itself."""

from __future__ import annotations

import torch

from lissom.devices.meters import Timing
from lissom.devices.profiles import Profile
from lissom.evolve.measure import Bench, Workload
from lissom.recipes import Recipe


class FakeBench:
    """Compaction costs quality and saves bytes; bfloat16 is twice as fast. `calls` is what was asked for."""

    loss = Bench.loss

    def __init__(self, stop_after: int | None = None) -> None:
        self.base, self.workload, self.tokens = Recipe(model="m"), Workload(), 1000
        self.own_dtype = torch.float32
        self.calls: list[tuple[str, str, int]] = []
        self.stop_after = stop_after

    def _called(self, kind: str, recipe: Recipe, number: int) -> None:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((kind, recipe.label, number))

    def _ratio(self, recipe: Recipe) -> float:
        settings = [s for step in recipe.methods for s in step.values()]
        return min([s.get("ratio", 0.1) for s in settings if "size" not in s], default=0.3 if settings else 1.0)

    def quality(self, recipe: Recipe, number: int) -> dict:
        self._called("quality", recipe, number)
        ours = any("attention-matching" in step for step in recipe.methods)
        nll = (1 - self._ratio(recipe)) * (0.05 if ours else 0.5) + 0.001 * (recipe.dtype == "bfloat16")
        width = 2 if recipe.dtype == "bfloat16" else 4
        score = {"nll": 1 + nll, "kl": nll, "top1": 1 - nll, "recalled": True}
        return {"scores": [score] * 4, "following": [1 + nll] * 2, "cache_bytes": 1e6 * width * self._ratio(recipe)}

    def timing(self, recipe: Recipe, number: int) -> Timing:
        self._called("timing", recipe, number)
        speed = (2 if recipe.dtype == "bfloat16" else 1) * (0.5 if recipe.threads == 1 else 1)
        decode = (0.05 + 0.05 * self._ratio(recipe)) / speed
        return Timing(1000, 1.0 / speed, 1.1 / speed, decode, 1.1 / speed + 32 * decode, None)

    def peak(self, recipe: Recipe) -> int:
        self._called("peak", recipe, 0)
        return 10**9


def fake_profile() -> Profile:
    return Profile("a board")
