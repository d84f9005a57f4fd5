"""A bench that measures nothing: figures follow from the recipe, so the search can be tested by itself."""

from __future__ import annotations

import torch

from lissom.devices.meters import Timing
from lissom.devices.profiles import Profile
from lissom.evolve.measure import Bench, Workload
from lissom.recipes import Recipe


class FakeBench:
    """Compaction costs quality and saves bytes; bfloat16 is twice as fast, native passes are four times, weights in few
    bits small and twice as fast. `calls` is what was asked for."""

    loss, weights, context = Bench.loss, staticmethod(Bench.weights), Bench.context

    def __init__(self, stop_after: int | None = None, architecture: str = "gpt2", packed: bool = False) -> None:
        """`architecture`: of gpt2 there are no native passes; `packed`: of a file with 5 bits a weight."""
        self.base, self.workload, self.tokens = Recipe(model="m"), Workload(), 1000
        self.own_dtype, self.architecture = torch.float32, architecture
        self.packed, self.weight_bits = packed, 5.0 if packed else 32.0
        self.calls: list[tuple[str, str, int]] = []
        self.stop_after = stop_after

    def _called(self, kind: str, recipe: Recipe, number: int) -> None:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((kind, recipe.label, number))

    @staticmethod
    def _steps(recipe: Recipe) -> dict[str, dict]:
        return {key: settings for step in recipe.methods for key, settings in step.items()}

    def _ratio(self, recipe: Recipe) -> float:
        steps = self._steps(recipe)
        if "kv-budget" in steps:
            return 0.3
        return min([steps[key].get("ratio", 0.1) for key in ("attention-matching", "eviction") if key in steps] or [1])

    def _bits(self, recipe: Recipe) -> float:
        quantized = self._steps(recipe).get("quantize")
        if quantized is not None:
            return {4: 5.0, 8: 8.5}[quantized.get("bits", 4)]
        return self.weight_bits if recipe.weights == "packed" else 16 if recipe.dtype == "bfloat16" else 32

    def quality(self, recipe: Recipe, number: int) -> dict:
        self._called("quality", recipe, number)
        steps, bits = self._steps(recipe), self._bits(recipe)
        nll = (1 - self._ratio(recipe)) * (0.05 if "attention-matching" in steps else 0.5)
        nll += 0.001 * (recipe.dtype == "bfloat16") + (
            {5.0: 0.03, 8.5: 0.001}.get(bits, 0) if "quantize" in steps else 0
        )
        native = steps.get("native-decode")
        width = 4 if native is None and recipe.dtype != "bfloat16" else 1 if (native or {}).get("kv") == "int8" else 2
        copies = 2 if native is not None and bits >= 16 else 1
        score = {"nll": 1 + nll, "kl": nll, "top1": 1 - nll, "recalled": True}
        return {
            "scores": [score] * 4,
            "following": [1 + nll] * 2,
            "cache_bytes": 1e6 * width * self._ratio(recipe),
            "weight_bytes": 1e6 * bits / 8 * copies,
        }

    def timing(self, recipe: Recipe, number: int) -> Timing:
        self._called("timing", recipe, number)
        speed = (2 if recipe.dtype == "bfloat16" else 1) * (0.5 if recipe.threads == 1 else 1)
        if "native-decode" in self._steps(recipe):
            speed *= 4 * (2 if self._bits(recipe) < 16 else 1)
        decode = (0.05 + 0.05 * self._ratio(recipe)) / speed
        return Timing(1000, 1.0 / speed, 1.1 / speed, decode, 1.1 / speed + 32 * decode, None)

    def peak(self, recipe: Recipe) -> int:
        self._called("peak", recipe, 0)
        return 10**9


def fake_profile() -> Profile:
    return Profile("a board")
