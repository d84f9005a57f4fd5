"""V_0.5 (arXiv 2603.10848): rewards are compared with what was expected and with a few rollouts, fused by their errors.

The mean of four rollouts is a noisy baseline, and a prior is sometimes far off. Between them stands a positive-part
James-Stein rule: a prior within one deviation of the mean is believed altogether, and one further off the less, the
further. A prompt whose rollouts are all right or all wrong still teaches. How far the prior is off also says how many
more rollouts a prompt is worth.

`ValuePriorTrainer` is TRL's GRPOTrainer with such a baseline and budget; baselines, priors and the planner work on any
rewards.
"""

from typing import TYPE_CHECKING, Any

from lissom.rl.value_prior.baselines import (
    BASELINES,
    Baseline,
    Fusion,
    LeaveOneOut,
    Mean,
    PriorOnly,
    Rollouts,
    ShrinkToBatch,
)
from lissom.rl.value_prior.config import ValuePriorConfig
from lissom.rl.value_prior.planner import Budget
from lissom.rl.value_prior.priors import (
    BatchMean,
    Constant,
    Context,
    Flipped,
    GaussianProcess,
    Generalist,
    History,
    Neighbours,
    Outcome,
    Prior,
    Ridge,
)

if TYPE_CHECKING:
    from lissom.rl.value_prior.trainer import ValuePriorTrainer

PRIORS = {
    "gp": GaussianProcess, "ridge": Ridge, "neighbours": Neighbours, "history": History, "batch-mean": BatchMean,
}  # fmt: skip

__all__ = [
    "BASELINES",
    "PRIORS",
    "Baseline",
    "BatchMean",
    "Budget",
    "Constant",
    "Context",
    "Flipped",
    "Fusion",
    "GaussianProcess",
    "Generalist",
    "History",
    "LeaveOneOut",
    "Mean",
    "Neighbours",
    "Outcome",
    "Prior",
    "PriorOnly",
    "Ridge",
    "Rollouts",
    "ShrinkToBatch",
    "ValuePriorConfig",
    "ValuePriorTrainer",
]


def __getattr__(name: str) -> Any:
    if name != "ValuePriorTrainer":
        raise AttributeError(f"module 'lissom.rl.value_prior' has no attribute {name!r}")
    from lissom.rl.value_prior.trainer import ValuePriorTrainer  # TRL takes seconds, and the rest does without it

    return ValuePriorTrainer
