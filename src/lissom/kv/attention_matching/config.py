"""Settings of attention matching, and the fit of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from lissom.errors import UserError
from lissom.kv.attention_matching.matching import (
    attention,
    fit_mass,
    fit_values,
    mass_features,
    pooled,
    refined_pursuit,
    sweep,
)
from lissom.kv.compactor import Compactor, Problem, Queries, top_entries
from lissom.kv.storage import Block
from lissom.models.method import SearchContext

Selection = Literal["hak", "omp", "omp-fast", "omp-progressive", "random"]

# (keys per step k, refit every τ steps) of the paper's OMP variants; None is the progressive schedule.
_PURSUITS: dict[str, tuple[int | None, int]] = {
    "omp": (1, 1),
    "omp-fast": (4, 2),
    "omp-progressive": (None, 1),
}


@dataclass(frozen=True)
class AttentionMatching(Compactor):
    """Compaction by attention matching.

    `mass_ridge`, `ridge` and `prior` were chosen by held-out measurement (see the method's page); with
    `mass_ridge=0, ridge=0` it is the published fit.

    Attributes:
        select: how keys are chosen: `hak` (highest attention keys), the OMP variants, or `random` (a control).
        bias: fit β; without it a subset of keys can only lose mass.
        fit_values: fit new values; without it the originals are copied.
        beta_max: bound on |β| for HAK (paper: 3); OMP has β <= 7 (paper).
        exact: solve the mass fit to optimality instead of the published clamp and two gradient steps.
        mass_ridge: draws e^β towards 1, an entry that stands for itself, where the queries say nothing (paper: 0).
        ridge: λ/(‖X‖²_F/t) of the value fit (paper: 0).
        prior: what that ridge draws the values towards: `original` or `zero` (the code's).
        refinements: of OMP: how often keys of next to no weight (β < -7) are replaced (the code: up to 3); what is left
            with such a weight is dropped, so fewer entries may be stored.
        reduce, pool: how HAK reduces attention over queries (paper: rms), and the width of its max-pool (0 = none).
    """

    name: ClassVar[str] = "attention-matching"

    queries: Queries = "repeat"
    select: Selection = "hak"
    bias: bool = True
    fit_values: bool = True
    beta_max: float = 3.0
    exact: bool = False
    mass_ridge: float = 1e-2
    ridge: float = 1e-3
    prior: Literal["original", "zero"] = "original"
    refinements: int = 3
    reduce: Literal["rms", "mean", "max"] = "rms"
    pool: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in ("hak", "random", *_PURSUITS):
            raise UserError(f"select={self.select!r}: expected one of hak, random, {', '.join(_PURSUITS)}.")
        if self.queries == "none":
            raise UserError("Attention matching needs reference queries: queries='none' is for eviction methods.")
        for name in ("ridge", "mass_ridge"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name}={getattr(self, name)} must be a finite number of at least 0.")

    def __str__(self) -> str:
        return super().__str__() + (f" ({self.queries})" if self.queries != "repeat" else "")

    @classmethod
    def candidates(cls, context: SearchContext) -> list[Self]:
        """See `lissom.models.method.Method`."""
        fast = [cls(ratio=0.25, queries="context")]
        if context.quick:
            return [*fast, cls(ratio=0.5), cls(ratio=0.25)]
        return [*fast, *(cls(ratio=ratio) for ratio in (0.5, 0.25, 0.1))]

    def fit(self, problem: Problem, budget: Sequence[int]) -> list[Block]:
        """See `Compactor.fit`. Heads whose budget covers all their entries keep them exactly."""
        available = problem.exists.sum(-1).tolist()
        if all(count >= have for count, have in zip(budget, available, strict=True)):
            return [problem.block(h, problem.exists[h].nonzero().flatten()) for h in range(len(budget))]
        swept = sweep(problem.logits_by_parts(), problem.values, self.reduce)
        chosen = self._select(problem, swept.scores, budget)
        # Heads may keep different numbers: shorter lists are padded with a column that is switched off.
        longest = max(len(indices) for indices in chosen)
        index = torch.stack([torch.nn.functional.pad(i, (0, longest - len(i))) for i in chosen])
        keep = torch.stack([torch.arange(longest, device=index.device) < len(i) for i in chosen])
        kept_logits = problem.part(index).logits().masked_fill_(~keep[:, None], -torch.inf)
        old_bias = problem.bias.gather(1, index)
        bias = torch.zeros_like(old_bias)
        if self.bias:
            kept = torch.exp(kept_logits - swept.top)
            lower, upper, steps = self._bounds()
            bias = fit_mass(kept, swept.mass, lower, upper, steps, self.exact, self.mass_ridge).log().to(bias.dtype)
        size = problem.values.shape[-1]
        original = problem.values.gather(1, index[..., None].expand(-1, -1, size))
        values = original
        if self.fit_values:
            prior = original if self.prior == "original" else None
            fitted = fit_values(attention(kept_logits + bias[:, None]), swept.outputs, self.ridge, prior)
            values = fitted.to(original.dtype)
        blocks = []
        for head, indices in enumerate(chosen):
            if budget[head] >= available[head]:
                blocks.append(problem.block(head, indices))
                continue
            count = len(indices)
            total = old_bias[head, :count] + bias[head, :count]
            blocks.append(
                Block(problem.keys[head, indices], values[head, :count], problem.positions[head, indices], total)
            )
        return blocks

    def _bounds(self) -> tuple[float, float, int]:
        if self.select in _PURSUITS:
            return 1e-12, math.exp(7.0), 0
        return math.exp(-self.beta_max), math.exp(self.beta_max), 2

    def _select(self, problem: Problem, scores: torch.Tensor, budget: Sequence[int]) -> list[torch.Tensor]:
        if self.select == "hak":
            return top_entries(pooled(scores, self.pool), problem, budget)
        if self.select == "random":
            generator = torch.Generator().manual_seed(problem.seed)
            return top_entries(torch.rand(problem.bias.shape, generator=generator), problem, budget)
        keys_per_step, refit_every = _PURSUITS[self.select]
        order = refined_pursuit(
            *mass_features(problem.logits()),
            max(budget),
            math.exp(7.0),
            1e-12,
            keys_per_step,
            refit_every,
            problem.protected & problem.exists,
            self.refinements,
        )
        return [indices[:count].sort().values for indices, count in zip(order, budget, strict=True)]
