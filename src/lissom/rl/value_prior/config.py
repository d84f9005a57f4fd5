"""Settings of V_0.5."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lissom.errors import UserError
from lissom.rl.value_prior.baselines import Baseline, Fusion
from lissom.rl.value_prior.planner import Budget
from lissom.rl.value_prior.priors import GaussianProcess, Prior


@dataclass(frozen=True)
class ValuePriorConfig:
    """Rewards compared with a prior and a few rollouts together (V_0.5, arXiv 2603.10848).

    Attributes:
        baseline: of advantages; the paper's is `Fusion()`.
        prior: what a prompt is expected to score. The paper's is a model of its own (`Generalist`), which took many
            GPUs to train; the default is a Gaussian process over the policy's own features of prompts, which has the
            outcomes of the last steps as its context.
        budget: rollouts of a prompt; None: as many as the trainer's `num_generations`, for each.
        scale_rewards: what advantages are divided by: `none`, or the deviation of the `batch`. Never that of a group:
            it is 0 where all rewards are equal, which is just where the prior still teaches.

        drop_silent: take the mean of the loss over prompts that teach something, as DAPO does by drawing others in the
            place of those that do not (arXiv 2503.14476): for comparison. It contradicts the method.

    Raises:
        UserError: a value is out of range.
    """

    baseline: Baseline = field(default_factory=Fusion)
    prior: Prior = field(default_factory=GaussianProcess)
    budget: Budget | None = field(default_factory=Budget)
    scale_rewards: Literal["none", "batch"] = "none"
    drop_silent: bool = False

    def __post_init__(self) -> None:
        if self.scale_rewards not in ("none", "batch"):
            raise UserError(f"scale_rewards={self.scale_rewards!r}: expected none or batch.")
        if self.budget is not None and self.budget.most > self.budget.first and not isinstance(self.baseline, Fusion):
            raise UserError("A budget plans with how far the prior is off, which only the fused baseline tells.")
