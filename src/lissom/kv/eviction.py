"""Eviction: keep the best-scored entries unchanged. The baselines that a compaction must beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F

from lissom.errors import UserError
from lissom.kv.compactor import Compactor, Problem, Queries, top_entries
from lissom.kv.storage import Block
from lissom.models.method import SearchContext, described


def random_scores(problem: Problem) -> torch.Tensor:
    """Uniform at random."""
    generator = torch.Generator().manual_seed(problem.seed)
    return torch.rand(problem.bias.shape, generator=generator).to(problem.bias.device)


def streaming_llm_scores(problem: Problem) -> torch.Tensor:
    """Latest first (StreamingLLM, arXiv 2309.17453); its sinks are the protected first tokens."""
    return problem.positions.float()


def h2o_scores(problem: Problem) -> torch.Tensor:
    """Attention accumulated over the document's own causal queries, per query (H2O, arXiv 2306.14048)."""
    return problem.statistics("mean", with_outputs=False).scores


def snapkv_scores(problem: Problem, window: int = 64, pool: int = 7) -> torch.Tensor:
    """Attention of the last `window` queries, max-pooled; the window itself is kept (SnapKV, arXiv 2404.14469)."""
    last = problem.query_positions >= problem.query_positions.max() - (window - 1)
    scores = _weights(problem, last).mean(1)
    scores = F.max_pool1d(scores[:, None], pool, stride=1, padding=pool // 2)[:, 0]
    recent = problem.positions > problem.positions.max() - window
    # Where the budget is smaller than the window, the latest of its tokens win.
    return torch.where(recent, 1.0 + problem.positions.float(), scores)


def tova_scores(problem: Problem) -> torch.Tensor:
    """Attention of the last query, averaged over all heads of the layer (TOVA, arXiv 2401.06104)."""
    last = problem.query_positions == problem.query_positions.max()
    weights = _weights(problem, last).mean((0, 1))
    return weights.expand_as(problem.bias)


def kvzip_scores(problem: Problem) -> torch.Tensor:
    """Largest attention that any query gives while the document is repeated (KVzip, arXiv 2505.23416).

    The softmax is over the document and the repeated tokens, as KVzip's own is for a document of one chunk (2048
    tokens); a longer one is repeated in one piece here, chunk by chunk there.
    """
    return problem.statistics(with_outputs=False).largest


def expected_attention_scores(problem: Problem) -> torch.Tensor:
    """e^(kμ·s + s²·kΣkᵀ/2)·‖v‖ for Gaussian queries with the moments of the recorded ones (arXiv 2510.00636).

    The moments are those of the rotated queries, without the original's averaging over future rotations.
    """
    mean = problem.queries.mean(1)
    centred = problem.queries - mean[:, None]
    covariance = centred.mT @ centred / max(1, centred.shape[1] - 1)
    linear = (problem.keys @ mean[..., None])[..., 0] * problem.scaling
    quadratic = ((problem.keys @ covariance) * problem.keys).sum(-1) * problem.scaling**2 / 2
    exponent = linear + quadratic + problem.bias
    exponent = exponent - exponent.amax(-1, keepdim=True)
    return exponent.exp() * problem.values.norm(dim=-1)


def _weights(problem: Problem, rows: torch.Tensor) -> torch.Tensor:
    last = replace(problem, queries=problem.queries[:, rows], query_positions=problem.query_positions[rows])
    return torch.softmax(last.logits(), dim=-1).nan_to_num(0.0)


SCORES: dict[str, tuple[Callable[[Problem], torch.Tensor], Queries]] = {
    "random": (random_scores, "none"),
    "streaming-llm": (streaming_llm_scores, "none"),
    "h2o": (h2o_scores, "context"),
    "snapkv": (snapkv_scores, "context"),
    "tova": (tova_scores, "context"),
    "kvzip": (kvzip_scores, "repeat"),
    "expected-attention": (expected_attention_scores, "context"),
}


@dataclass(frozen=True)
class Eviction(Compactor):
    """Keep the best entries by `score`, drop the others. Values are the originals and every bias is zero.

    Attributes:
        score: one of `SCORES`.
    """

    name: ClassVar[str] = "eviction"

    score: str = "snapkv"
    queries: Queries = field(default="context", init=False)  # each score has its own

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.score, str) or self.score not in SCORES:
            raise UserError(f"score={self.score!r}: expected one of {', '.join(SCORES)}.")
        object.__setattr__(self, "queries", SCORES[self.score][1])

    @classmethod
    def candidates(cls, context: SearchContext) -> list[Self]:
        """See `lissom.models.method.Method`. The scores that were best in the comparison of all."""
        scores = ("h2o", "streaming-llm") if context.quick else ("h2o", "snapkv", "kvzip", "streaming-llm")
        ratios = (0.5,) if context.quick else (0.5, 0.25)
        # KVzip's own rule shares out over all heads.
        return [
            cls(ratio=ratio, score=score, budgets="global" if score == "kvzip" else "uniform")
            for score in scores
            for ratio in ratios
        ]

    def __str__(self) -> str:
        return described(self, f"{self.score} {100 * self.ratio:.4g}%", "ratio", "score", "queries")

    @property
    def wants_own_mass(self) -> bool:
        """See `Compactor.wants_own_mass`."""
        return self.score == "kvzip"

    def scores(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Compactor.scores`."""
        scores = problem.ranked(SCORES[self.score][0](problem))
        return scores, scores

    def fit(self, problem: Problem, budget: Sequence[int], known: torch.Tensor | None = None) -> list[Block]:
        """See `Compactor.fit`."""
        chosen = top_entries(self.scores(problem)[0] if known is None else known, problem, budget)
        return [problem.block(head, indices) for head, indices in enumerate(chosen)]
