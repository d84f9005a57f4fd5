"""Settings of attention matching, and the fit of one layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from lissom.errors import UserError
from lissom.kernels.attention_statistics import Statistics
from lissom.kv.attention_matching.matching import (
    attention,
    fit_mass,
    fit_values,
    mass_features,
    pooled,
    refined_pursuit,
)
from lissom.kv.compactor import Budgets, Compactor, Problem, Queries, check_choice, check_whole, top_entries
from lissom.kv.storage import Block
from lissom.models.method import SearchContext

Selection = Literal["hak", "omp", "omp-fast", "omp-progressive", "random"]
Reduction = Literal["rms", "mean", "max"]
Prior = Literal["original", "zero"]

# (keys per step k, refit every τ steps) of the paper's OMP variants; None is the progressive schedule.
_PURSUITS: dict[str, tuple[int | None, int]] = {
    "omp": (1, 1),
    "omp-fast": (4, 2),
    "omp-progressive": (None, 1),
}


@dataclass(frozen=True)
class AttentionMatching(Compactor):
    """Compaction by attention matching.

    `mass_ridge`, `ridge`, `prior`, `fit_below` and `budgets` depart from the paper (what each is worth: the method's
    page); with `mass_ridge=0, ridge=0, fit_below=1, budgets="uniform"` it is the published method without measured head
    budgets.

    Attributes:
        select: how keys are chosen: `hak` (highest attention keys), the OMP variants, or `random` (a control).
        bias: fit β; without it a subset of keys can only lose mass.
        fit_values: fit new values; without it the originals are copied.
        beta_max: bound on |β| for HAK (paper: 3); OMP has β <= 7 (paper).
        exact: solve the mass fit to optimality instead of the published clamp and two gradient steps.
        mass_ridge: draws e^β towards 1, an entry that stands for itself, where the queries say nothing (paper: 0).
        ridge: λ/(‖X‖²_F/t) of the value fit (paper: 0).
        prior: what that ridge draws the values towards: `original` or `zero` (the code's).
        fit_below: a head that keeps at least this share of its entries keeps them as they are: there is little to fit,
            and the fit's time grows with the square of the entries (paper: 1, every head is fitted).
        refinements: of OMP: how often keys of next to no weight (β < -7) are replaced (the code: up to 3); what is left
            with such a weight is dropped, so fewer entries may be stored.
        reduce, pool: how HAK reduces attention over queries (paper: rms), and the width of its max-pool (0 = none).
    """

    name: ClassVar[str] = "attention-matching"

    queries: Queries = "repeat"
    budgets: Budgets = "auto"
    select: Selection = "hak"
    bias: bool = True
    fit_values: bool = True
    beta_max: float = 3.0
    exact: bool = False
    mass_ridge: float = 1e-2
    ridge: float = 1e-3
    prior: Prior = "original"
    fit_below: float = 0.5
    refinements: int = 3
    reduce: Reduction = "rms"
    pool: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("select", Selection), ("reduce", Reduction), ("prior", Prior)):
            check_choice(name, getattr(self, name), choices)
        if self.queries == "none":
            raise UserError("Attention matching needs reference queries: queries='none' is for eviction methods.")
        for name in ("ridge", "mass_ridge", "beta_max"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not (value >= 0 and math.isfinite(value)):
                raise UserError(f"{name}={value!r} must be a finite number of at least 0.")
        if self.beta_max > 80:
            raise UserError(f"beta_max={self.beta_max}: e^β would overflow; the paper has 3.")
        check_whole("pool", self.pool, 0)
        check_whole("refinements", self.refinements, 0)
        if self.pool > 0 and self.pool % 2 == 0:
            raise UserError(f"pool={self.pool}: expected an odd width, or 0 for none.")
        if not 0 <= self.fit_below <= 1:
            raise UserError(f"fit_below={self.fit_below} is not in [0, 1]: it is a share of a head's entries.")

    @classmethod
    def candidates(cls, context: SearchContext) -> list[Self]:
        """See `lissom.models.method.Method`."""
        fast = [cls(ratio=0.25, queries="context")]
        if context.quick:
            return [*fast, cls(ratio=0.5), cls(ratio=0.25)]
        return [*fast, *(cls(ratio=ratio) for ratio in (0.5, 0.25, 0.1))]

    @property
    def sharing(self) -> Budgets:
        """See `Compactor.sharing`: by the largest attention of a pass of its own; a first reading tells too little."""
        if self.budgets != "auto":
            return self.budgets
        return "uniform" if self.on_policy or self.queries == "context" else "global"

    @property
    def wants_own_mass(self) -> bool:
        """See `Compactor.wants_own_mass`. A first reading has no pass of its own beside the document."""
        return self.sharing == "global" and self.queries != "context"

    def scores(self, problem: Problem) -> tuple[torch.Tensor, Statistics]:
        """See `Compactor.scores`: each entry's largest attention, by which KVzip's own budgets go."""
        known = problem.statistics(self.reduce)
        return problem.ranked(known.largest), known

    def fit(self, problem: Problem, budget: Sequence[int], known: Statistics | None = None) -> list[Block]:
        """See `Compactor.fit`."""
        available = problem.exists.sum(-1).tolist()
        if all(count >= have for count, have in zip(budget, available, strict=True)):
            return [problem.block(h, problem.exists[h].nonzero().flatten()) for h in range(len(budget))]
        known = known or problem.statistics(self.reduce)
        chosen = self._select(problem, known.scores, budget)
        return [
            problem.block(h, indices)
            if len(indices) >= self.fit_below * available[h]
            else self._fit_head(problem.head(h), known.head(h), indices)
            for h, indices in enumerate(chosen)
        ]

    def _fit_head(self, problem: Problem, known: Statistics, indices: torch.Tensor) -> Block:
        """Biases and values of the kept entries `indices` of a problem of one head."""
        kept = problem.part(indices[None])
        logits = kept.logits()
        bias = torch.zeros_like(kept.bias)
        if self.bias:
            lower, upper, steps = self._bounds()
            features = torch.exp(logits - known.top[..., None])
            bias = fit_mass(features, known.mass, lower, upper, steps, self.exact, self.mass_ridge).log().to(bias.dtype)
        values = kept.values
        if self.fit_values:
            prior = values if self.prior == "original" else None
            weights = attention(logits.add_(bias[:, None]))
            values = fit_values(weights, known.outputs, self.ridge, prior).to(values.dtype)
        return Block(kept.keys[0], values[0], kept.positions[0], (kept.bias + bias)[0])

    def _bounds(self) -> tuple[float, float, int]:
        if self.select in _PURSUITS:
            return 1e-12, math.exp(7.0), 0
        return math.exp(-self.beta_max), math.exp(self.beta_max), 2

    def _select(self, problem: Problem, scores: torch.Tensor, budget: Sequence[int]) -> list[torch.Tensor]:
        if self.select == "hak":
            return top_entries(pooled(scores, self.pool), problem, budget)
        if self.select == "random":
            generator = torch.Generator().manual_seed(problem.seed)
            drawn = torch.rand(problem.bias.shape, generator=generator).to(problem.bias.device)
            return top_entries(drawn, problem, budget)
        keys_per_step, refit_every = _PURSUITS[self.select]
        lower, upper, _ = self._bounds()
        chosen = []
        for head, count in enumerate(budget):  # each may have a budget of its own
            one = problem.head(head)
            (order,) = refined_pursuit(
                *mass_features(one.logits()),
                min(count, int(one.exists.sum())),
                upper,
                lower,
                keys_per_step,
                refit_every,
                one.protected & one.exists,
                self.refinements,
            )
            chosen.append(order.sort().values)
        return chosen
