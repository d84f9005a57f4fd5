"""Settings of a tree search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lissom.errors import UserError
from lissom.models.method import check_types

Extraction = Literal["visits", "value", "best"]


@dataclass(frozen=True)
class SearchConfig:
    """A search over reasoning steps (after A. Tambde, "Tree Search Distillation", 2026, which is a blog post and code).

    Attributes:
        simulations: paths from the root, of each tree (published code: 1600).
        children: steps that are sampled where a node is expanded (published: 4).
        rule: `puct` (published): `Q + c P sqrt(N) / (1 + n)`; `uct`: `Q + c sqrt(log N / n)`, without priors.
        exploration: the c of it (published: 0.5).
        prior: of sampled steps. `policy` (published): the softmax of their log probabilities; that counts the policy
            twice, since the steps are drawn from it, and favours short ones. `uniform`: as often as each was drawn.
            `length-normalised`: the softmax of log probabilities per token.
        backup: what a node is worth: the `mean` of what was found below it (published), or the `max`.
        unvisited: what a step that was not tried is worth: `zero` (published) or its `parent`.
        wave: simulations of a tree that are under way at the same time. Each counts, until it has come back, as a visit
            that found the lowest reward; the published code counts a visit that found 0, which draws others near where
            rewards are negative.
        merge: whether equal steps of a node are one (published: no).
        close: whether nodes below which everything is known are left alone (published: no). Visits say little about
            value then: extract the `best`.
        widening: `(first, power)`: a node has up to `first * visits ** power` steps, and more are sampled as it is
            visited; None (published): `children`, once.
        depth: steps of a path, at most.
        low, high: between what rewards and values are.
        normalise: scale values by the least and the greatest of the tree, as MuZero does: for rewards whose range says
            little.
        seed: of ties, and of what worlds draw.

    Raises:
        UserError: a value is out of range.
    """

    simulations: int = 64
    children: int = 4
    rule: Literal["puct", "uct"] = "puct"
    exploration: float = 0.5
    prior: Literal["policy", "uniform", "length-normalised"] = "policy"
    backup: Literal["mean", "max"] = "mean"
    unvisited: Literal["zero", "parent"] = "zero"
    wave: int = 4
    merge: bool = True
    close: bool = False
    widening: tuple[float, float] | None = None
    depth: int = 16
    low: float = -1.0
    high: float = 1.0
    normalise: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.widening, list):  # of YAML
            object.__setattr__(self, "widening", tuple(self.widening))
        check_types(self)
        for name in ("simulations", "children", "wave", "depth"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if not (math.isfinite(self.exploration) and self.exploration >= 0):
            raise UserError(f"exploration={self.exploration}: expected a number from 0.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"low={self.low}, high={self.high}: expected the range of rewards.")
        if self.widening is not None and not (self.widening[0] >= 1 and 0 <= self.widening[1] <= 1):
            raise UserError(f"widening={self.widening}: expected a number from 1, and a power from 0 to 1.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: expected a number from 0 to below 2^32.")

    def allowed(self, visits: int) -> int:
        """Steps that a node of so many visits may have."""
        if self.widening is None:
            return self.children
        first, power = self.widening
        return math.ceil(first * max(visits, 1) ** power)
