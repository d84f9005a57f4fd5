"""What every way of compacting a KV cache has in common: the problem of one layer and the settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from transformers import PreTrainedModel

from lissom.errors import UserError
from lissom.kernels.attention_statistics import Statistics, attention_statistics
from lissom.kernels.matmul import matmul
from lissom.kv.storage import Block
from lissom.models.method import described

Budgets = Literal["auto", "uniform", "global", "measured"]
Queries = Literal["none", "context", "repeat", "self-study", "repeat+self-study"]


@dataclass(frozen=True)
class Problem:
    """One layer and one row: its entries and the reference queries, all in fp32.

    Attributes:
        keys, values: `[heads, entries, head_dim]`, heads = KV heads.
        bias: `[heads, entries]`; -inf marks an entry that does not exist (ragged heads).
        positions: `[heads, entries]`, the token that each entry came from.
        protected: bool `[heads, entries]`, entries that must be kept.
        queries: `[heads, queries, head_dim]`, rotated; the queries of a KV head's whole group.
        query_positions: `[queries]`.
        scaling: factor on the logits.
        seed: for methods that draw.
        own_mass: `[heads, queries]`, log mass that each query finds outside the document; None where not asked for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    positions: torch.Tensor
    protected: torch.Tensor
    queries: torch.Tensor
    query_positions: torch.Tensor
    scaling: float
    seed: int = 0
    own_mass: torch.Tensor | None = None

    def logits(self) -> torch.Tensor:
        """`[heads, queries, entries]`: scaled, biased, -inf where the entry is absent or later than the query."""
        logits = matmul(self.queries * self.scaling, self.keys.mT).add_(self.bias[:, None])
        if self._all_are_seen:
            return logits
        return logits.masked_fill_(self.positions[:, None] > self.query_positions[:, None], -torch.inf)

    @property
    def _all_are_seen(self) -> bool:
        """Whether no query comes before an entry."""
        return int(self.query_positions.min()) >= int(self.positions.max())

    def statistics(self, reduction: str = "rms", with_outputs: bool = True) -> Statistics:
        """Mass and output of every query, and the weights of every entry; the largest weight is that in a softmax that
        covers the query's own pass, too, where `own_mass` is known."""
        causal = not self._all_are_seen
        return attention_statistics(
            self.queries,
            self.keys,
            self.values if with_outputs else None,
            self.bias,
            self.scaling,
            reduction,
            positions=self.positions if causal else None,
            query_positions=self.query_positions if causal else None,
            elsewhere=self.own_mass,
        )

    def part(self, index: torch.Tensor) -> Problem:
        """The problem of the entries `index` `[heads, t]` alone."""
        wide = index[..., None].expand(-1, -1, self.keys.shape[-1])
        keys, values = self.keys.gather(1, wide), self.values.gather(1, wide)
        bias, positions = self.bias.gather(1, index), self.positions.gather(1, index)
        return replace(
            self, keys=keys, values=values, bias=bias, positions=positions, protected=self.protected.gather(1, index)
        )

    def head(self, index: int) -> Problem:
        """The problem of one head alone."""
        names = ("keys", "values", "bias", "positions", "protected", "queries", "own_mass")
        one = slice(index, index + 1)
        parts = {name: tensor[one] for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **parts)

    def ranked(self, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[heads, entries]`, with +inf for what must be kept and -inf for what does not exist."""
        return scores.masked_fill(self.protected, torch.inf).masked_fill(~self.exists, -torch.inf)

    @property
    def exists(self) -> torch.Tensor:
        """bool `[heads, entries]`."""
        return self.bias > -torch.inf

    def block(self, head: int, indices: torch.Tensor) -> Block:
        """The original entries `indices` of one head."""
        return Block(
            self.keys[head, indices],
            self.values[head, indices],
            self.positions[head, indices],
            self.bias[head, indices],
        )


class Wanted(NamedTuple):
    """Which reference queries a compaction wants; attributes as of `Compactor`."""

    queries: Queries
    max_queries: int
    seed: int
    own_mass: bool


@dataclass(frozen=True)
class Compactor(ABC):
    """Settings that all methods share.

    Called with a model it is a context manager: inside it, `generate` and plain forward calls with an ordinary cache
    compact what was read as soon as the prompt has been processed. Leaving it restores the model.

    Attributes:
        ratio: stored entries / tokens, in (0, 1]. Everything counts: protected tokens are part of the budget.
        sinks: first tokens that are always kept (attention sinks and the start of a chat template).
        recent: last tokens of the document that are always kept.
        max_queries: reference queries per KV head and pass at most, drawn at random (paper: 50,000 in all).
        min_tokens: shorter inputs are left as they are (context-manager use).
        seed: of the draw.
        budgets: how the entries are shared out over layers and KV heads: `uniform`; `global`, the best scores of all
            heads win (KVzip's own rule); `measured`, by `shares`; `auto`, as the method thinks best.
        shares: of each layer and KV head of the total, `[layers][heads]`, as `lissom budgets` measured them.
        on_policy: fit each layer during the last pass, on queries that have passed the compacted layers below.
    """

    name: ClassVar[str]

    ratio: float = 0.1
    sinks: int = 4
    recent: int = 0
    queries: Queries = "context"
    max_queries: int = 8192
    min_tokens: int = 64
    seed: int = 0
    budgets: Budgets = "uniform"
    shares: tuple[tuple[float, ...], ...] = ()
    on_policy: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ratio, int | float) or isinstance(self.ratio, bool) or not 0.0 < self.ratio <= 1.0:
            raise UserError(f"ratio={self.ratio!r} is not in (0, 1]: it is the share of the cache that is kept.")
        for name, least in (("sinks", 0), ("recent", 0), ("min_tokens", 0), ("max_queries", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        for name, choices in (("budgets", Budgets), ("queries", Queries)):
            check_choice(name, getattr(self, name), choices)
        if (self.budgets == "measured") != bool(self.shares):
            raise UserError("budgets='measured' and shares=... (see `lissom budgets`) go together.")
        if not all(math.isfinite(share) and share >= 0 for layer in self.shares for share in layer):
            raise UserError("shares=...: expected numbers of at least 0, one per layer and KV head.")
        if self.on_policy and (self.sharing != "uniform" or self.queries in ("none", "context")):
            raise UserError("on_policy needs uniform budgets and queries of a repeat pass or self-study.")

    @property
    def sharing(self) -> Budgets:
        """`budgets` with `auto` decided."""
        return "uniform" if self.budgets == "auto" else self.budgets

    @property
    def wants_own_mass(self) -> bool:
        """Whether `fit` needs `Problem.own_mass`."""
        return False

    @property
    def evidence(self) -> Wanted:
        """The reference queries that `fit` needs."""
        return Wanted(self.queries, self.max_queries, self.seed, self.wants_own_mass)

    @abstractmethod
    def scores(self, problem: Problem) -> tuple[torch.Tensor, Any]:
        """How much each entry counts, `[heads, entries]`, comparable between heads, for budgets='global'; and what
        `fit` can use again."""

    @abstractmethod
    def fit(self, problem: Problem, budget: Sequence[int], known: Any = None) -> list[Block]:
        """Entries that replace those of `problem`: for each head at most `budget[head]`.

        Args:
            known: what `scores` gave for this problem, where it was asked.
        """

    def budget(self, tokens: int) -> int:
        """Entries to keep per head out of `tokens`: at least one beyond what is protected."""
        return min(tokens, max(round(self.ratio * tokens), min(tokens, self.sinks + self.recent) + 1))

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        from lissom.kv.transparent import compacted_after_prefill

        return compacted_after_prefill(model, self)

    def __str__(self) -> str:
        return described(self, f"{self.name} {100 * self.ratio:.4g}%", "ratio")

    def settings(self) -> dict[str, Any]:
        """Method name and settings, for recipes and saved caches."""
        return {"method": self.name, **asdict(self)}


def check_whole(name: str, given: Any, least: int) -> None:
    """Raise a `UserError` where `given` is no whole number of at least `least` (and of 63 bits at most)."""
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given < 2**62:
        raise UserError(f"{name}={given!r}: expected a whole number of at least {least}.")


def check_choice(name: str, given: Any, choices: Any) -> None:
    """Raise a `UserError` where `given` is none of the values of the Literal `choices`."""
    known = get_args(choices)
    if given not in known:
        raise UserError(f"{name}={given!r}: expected one of {', '.join(map(str, known))}.")


def top_entries(scores: torch.Tensor, problem: Problem, budget: Sequence[int]) -> list[torch.Tensor]:
    """Per head the indices of the best `budget[head]` entries in their original order, protected ones first."""
    ranked = problem.ranked(scores)
    chosen = []
    for head, count in enumerate(budget):
        available = int(problem.exists[head].sum())
        chosen.append(ranked[head].topk(min(count, available)).indices.sort().values)
    return chosen
