"""What bounds do to the tokens of a step, by how likely the tokens were: it is only counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

EDGES = (0.0, 1e-3, 1e-2, 0.1, 0.5, 0.9, 1.0)  # of the old probability
SIGNS = ("up", "down")  # of the advantage: which bound is meant
BUCKETS = tuple(f"{low:g}-{high:g}" for low, high in pairwise(EDGES))


@dataclass(frozen=True)
class ClipCounts:
    """Tokens by sign of the advantage and bucket of the old probability, int64 `[2, buckets]`; sums of counts are
    counts.

    Attributes:
        tokens: all that have an advantage.
        clipped: those without a gradient under the bounds.
        freed: those that the other bounds would clip and these do not.
        held: those that these clip and the others would not.
    """

    tokens: Tensor
    clipped: Tensor
    freed: Tensor
    held: Tensor

    def stacked(self) -> Tensor:
        """`[4, 2, buckets]`, to be summed over processes and steps."""
        return torch.stack([self.tokens, self.clipped, self.freed, self.held])

    def shares(self) -> dict[str, float]:
        """`clipped`, `freed` and `held` as shares of the tokens of each sign and bucket, and of all; NaN of none."""
        found = {}
        for number, sign in enumerate(SIGNS):
            for what in ("clipped", "freed", "held"):
                counts = getattr(self, what)[number]
                for bucket, count, tokens in zip(BUCKETS, counts, self.tokens[number], strict=True):
                    found[f"{what}/{sign}/{bucket}"] = _share(count, tokens)
                found[f"{what}/{sign}"] = _share(counts.sum(), self.tokens[number].sum())
        return found


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if whole else math.nan


def count(
    logp: Tensor,
    ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bounds: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
) -> ClipCounts:
    """Count tokens, all `[batch, tokens]`.

    Args:
        logp: the old policy's log probability.
        ratio: new probability / old.
        advantages: may be `[batch, 1]`.
        mask: which tokens are there.
        bounds, other: lowest and highest ratios.
    """
    advantages = advantages.expand_as(ratio)
    edges = torch.tensor(EDGES[1:-1], device=logp.device, dtype=torch.float64)
    bucket = torch.bucketize(logp.double().exp(), edges, right=True)
    up, down = (advantages > 0) & mask.bool(), (advantages < 0) & mask.bool()

    def beyond(limits: tuple[Tensor, Tensor]) -> Tensor:
        return (up & (ratio > limits[1])) | (down & (ratio < limits[0]))

    ours, theirs = beyond(bounds), beyond(other)
    place = bucket + down * len(BUCKETS)

    def counted(which: Tensor) -> Tensor:
        return torch.bincount(place[which], minlength=2 * len(BUCKETS)).view(2, len(BUCKETS))

    return ClipCounts(counted(up | down), counted(ours), counted(theirs & ~ours), counted(ours & ~theirs))
