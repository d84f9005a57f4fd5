"""What rewards are compared with: baselines of groups of rollouts that need not be of one size.

V_0.5 (arXiv 2603.10848) fuses a prompt's mean reward with what a prior expected. For `b = w mean + (1 - w) prior` the
error is `w² s² + (1 - w)² d²`, with `s²` the variance of the mean and `d` how far the prior is off. `d²` is not known;
`max(0, (mean - prior)² - s²)` stands for it, so that a prior within one deviation of the mean is believed altogether.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lissom.errors import UserError


@dataclass(frozen=True)
class Rollouts:
    """Rewards of some prompts' rollouts.

    Attributes:
        rewards: float64 `[rollouts]`.
        prompt: whose it is, from 0, int64 `[rollouts]`, in any order.
        prior: what each prompt was expected to have, float64 `[prompts]`.
        low, high: between what rewards are.

    Raises:
        UserError: shapes do not fit, a prompt has no rollout, or a number is not finite.
    """

    rewards: Tensor
    prompt: Tensor
    prior: Tensor
    low: float
    high: float
    sizes: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", self.rewards.double())
        object.__setattr__(self, "prior", self.prior.double())
        if self.rewards.shape != self.prompt.shape or self.rewards.ndim != 1 or self.prior.ndim != 1:
            raise UserError("Expected a reward and a prompt for each rollout, and a prior for each prompt.")
        if not math.isfinite(self.high - self.low) or self.low >= self.high:
            raise UserError(f"Rewards are said to be from {self.low} to {self.high}: expected a range.")
        if not (self.rewards.isfinite().all() and self.prior.isfinite().all()):
            raise UserError("Rewards and priors must be finite numbers.")
        sizes = torch.bincount(self.prompt, minlength=len(self.prior))
        if len(sizes) > len(self.prior) or bool((sizes == 0).any()):
            raise UserError("Every prompt needs a rollout, and every rollout a prompt that has a prior.")
        object.__setattr__(self, "sizes", sizes)

    def sums(self, values: Tensor) -> Tensor:
        """Of rollouts, for each prompt."""
        return torch.zeros_like(self.prior).index_add(0, self.prompt, values)

    @property
    def means(self) -> Tensor:
        """Mean reward of each prompt."""
        return self.sums(self.rewards) / self.sizes

    @property
    def worst_variance(self) -> float:
        """The most that the variance of a reward in the range can be."""
        return (self.high - self.low) ** 2 / 4


class Baseline(Protocol):
    """A number for each rollout, which its reward is compared with."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """Float64 `[rollouts]`."""
        ...


def _others(rollouts: Rollouts) -> Tensor:
    """The mean of a prompt's other rollouts, `[rollouts]`.

    Raises:
        UserError: there is none.
    """
    if bool((rollouts.sizes < 2).any()):
        raise UserError(
            "A prompt has one rollout: leaving it out leaves nothing. Take at least 2, or another baseline."
        )
    sums, sizes = rollouts.sums(rollouts.rewards)[rollouts.prompt], rollouts.sizes[rollouts.prompt]
    return (sums - rollouts.rewards) / (sizes - 1)


@dataclass(frozen=True)
class Mean:
    """The mean of a prompt's rollouts, as in GRPO."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `Baseline`."""
        return rollouts.means[rollouts.prompt]


@dataclass(frozen=True)
class LeaveOneOut:
    """The mean of a prompt's other rollouts, as in RLOO: without a rollout's own reward there is no bias."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `Baseline`."""
        return _others(rollouts)


@dataclass(frozen=True)
class PriorOnly:
    """What was expected, whatever the rollouts are: a history baseline, with a prior that keeps prompts' history."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `Baseline`."""
        return rollouts.prior[rollouts.prompt]


@dataclass(frozen=True)
class ShrinkToBatch:
    """Each prompt's mean, drawn towards that of all prompts by the positive part of James and Stein's estimator: it
    needs no prior, and is what a prior has to be better than."""

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `Baseline`."""
        means, prompts = rollouts.means, len(rollouts.prior)
        middle = means.mean()
        spread = (means - middle).square().sum()
        pooled = rollouts.sums((rollouts.rewards - means[rollouts.prompt]).square()).sum()
        freedom = int((rollouts.sizes - 1).sum())
        if prompts < 4 or freedom < 1 or spread == 0:
            return means[rollouts.prompt]
        noise = pooled / freedom / rollouts.sizes
        kept = (1 - (prompts - 3) * noise / spread).clamp(min=0)
        return (middle + kept * (means - middle))[rollouts.prompt]


class Fused(NamedTuple):
    """Of each prompt, or of each rollout where its own reward is left out.

    Attributes:
        baseline: between prior and mean.
        weight: of the mean, 0 to 1: 0 where the prior is believed.
        distance: estimated squared error of the prior.
    """

    baseline: Tensor
    weight: Tensor
    distance: Tensor


def fuse(mean: Tensor, prior: Tensor, variance: Tensor) -> Fused:
    """The fusion of arXiv 2603.10848: `|baseline - mean|` is never above the deviation of the mean.

    Args:
        mean, prior: of rewards.
        variance: of the mean, above 0.
    """
    distance = ((mean - prior).square() - variance).clamp(min=0)
    weight = distance / (distance + variance)
    return Fused(prior + weight * (mean - prior), weight, distance)


@dataclass(frozen=True)
class Fusion:
    """V_0.5's baseline.

    Attributes:
        variance: of a reward: `worst` (paper): the most that the range allows; `empirical` (extension): that of the
            prompt's rewards, pooled with all others', and at least `floor` of the worst.
        leave_one_out: a rollout's own reward stays out of its baseline (extension): no bias, and more noise.
        floor: see `variance`.
    """

    variance: Literal["worst", "empirical"] = "worst"
    leave_one_out: bool = False
    floor: float = 0.05

    def __call__(self, rollouts: Rollouts) -> Tensor:
        """See `Baseline`."""
        found = self.fused(rollouts).baseline
        return found if self.leave_one_out else found[rollouts.prompt]

    def fused(self, rollouts: Rollouts) -> Fused:
        """The whole of it, by prompt; with `leave_one_out` by rollout."""
        single = self.single(rollouts)
        if not self.leave_one_out:
            return fuse(rollouts.means, rollouts.prior, single / rollouts.sizes)
        own = rollouts.prompt
        return fuse(_others(rollouts), rollouts.prior[own], single[own] / (rollouts.sizes[own] - 1))

    def single(self, rollouts: Rollouts) -> Tensor:
        """The variance of one reward, `[prompts]`."""
        worst = torch.full_like(rollouts.prior, rollouts.worst_variance)
        if self.variance == "worst":
            return worst
        freedom = (rollouts.sizes - 1).sum()
        if freedom < 1:
            return worst
        squares = rollouts.sums((rollouts.rewards - rollouts.means[rollouts.prompt]).square())
        pooled = squares.sum() / freedom
        # As if each prompt had drawn two more rewards with the variance of all: a group of equal ones is no proof.
        return (
            ((squares + 2 * pooled) / (rollouts.sizes + 1)).clamp(self.floor * rollouts.worst_variance).minimum(worst)
        )


BASELINES: dict[str, type] = {
    "mean": Mean, "leave-one-out": LeaveOneOut, "prior": PriorOnly, "shrink": ShrinkToBatch, "v05": Fusion,
}  # fmt: skip
