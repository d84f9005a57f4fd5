"""BandPO (arXiv 2603.04918): a clip of each token's ratio that follows from a trust region on the whole vocabulary.

PPO's clip lets every ratio go as far, so that the probability of a rare token can hardly grow: its room is `0.2 p`.
Here the bounds of a token are the least and the greatest ratio that any distribution within an f-divergence of the old
policy can give it: wide for rare tokens, narrow for likely ones. By Jensen's inequality that is one equation with one
unknown for each side, which `band` solves, or looks up.

`BandPOTrainer` is TRL's GRPOTrainer with such a clip, or with one of those that it is compared with.
"""

from typing import TYPE_CHECKING, Any

from lissom.rl.band.config import BOUNDS, BandConfig, DynamicClip, FixedClip, ProbabilityMask, TokenBounds, band
from lissom.rl.band.divergences import Divergence, of_function

if TYPE_CHECKING:
    from lissom.rl.band.trainer import BandPOTrainer

__all__ = [
    "BOUNDS",
    "BandConfig",
    "BandPOTrainer",
    "Divergence",
    "DynamicClip",
    "FixedClip",
    "ProbabilityMask",
    "TokenBounds",
    "band",
    "of_function",
]


def __getattr__(name: str) -> Any:
    if name != "BandPOTrainer":
        raise AttributeError(f"module 'lissom.rl.band' has no attribute {name!r}")
    from lissom.rl.band.trainer import BandPOTrainer  # TRL takes seconds, and the bounds do without it

    return BandPOTrainer
