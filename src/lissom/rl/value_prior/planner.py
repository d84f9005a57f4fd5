"""How many more rollouts a prompt is worth (arXiv 2603.10848, its one-step look-ahead).

For rewards of -1 and 1 the fused baseline's error with k rollouts is `d² / (1 + k d²)`, so that one more lowers it by
`d⁴ / ((1 + k d²) (1 + (k + 1) d²))`. A rollout is drawn as long as that is more than its cost; a prior that is far off
(d² large) leaves `1 / (k (k + 1))`, which is the cost 1/256 of the paper at k = 16: cost and cap are one number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lissom.errors import UserError


def gain(distance: Tensor, size: Tensor) -> Tensor:
    """By what one more rollout lowers the error, for rewards from -1 to 1.

    Args:
        distance: estimated squared error of the prior; infinite where there is no prior.
        size: rollouts so far.
    """
    inverse = 1 / distance  # infinite where the prior is believed
    return 1 / ((size + inverse) * (size + 1 + inverse))


def target(distance: Tensor, cost: float) -> Tensor:
    """The least size at which one more rollout gains no more than `cost`: the solution of
    `(k + 1 / d²) (k + 1 + 1 / d²) = 1 / cost`, rounded up; 0 where the prior is believed."""
    inverse = 1 / distance
    size = torch.ceil(math.sqrt(1 / cost + 0.25) - 0.5 - inverse - 1e-9)
    return size.clamp(min=0).nan_to_num(nan=0.0, neginf=0.0).long()


@dataclass(frozen=True)
class Budget:
    """How many rollouts a prompt gets.

    Attributes:
        first: at once (paper: 4).
        most: at all (paper: 16).
        cost: of a rollout, in squared rewards of the range -1 to 1; None: `1 / most²`, as in the paper.
        extra: the most that all prompts of a step may have beyond their first ones; None: no limit but `most`. Those
            that gain most come first.

    Raises:
        UserError: a value is out of range.
    """

    first: int = 4
    most: int = 16
    cost: float | None = None
    extra: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.most:
            raise UserError(f"first={self.first}, most={self.most}: expected 1 to {self.most} rollouts at once.")
        if self.cost is not None and not 0 < self.cost < math.inf:
            raise UserError(f"cost={self.cost}: expected a number above 0.")
        if self.extra is not None and self.extra < 0:
            raise UserError(f"extra={self.extra}: expected a number from 0.")

    @property
    def price(self) -> float:
        """Of a rollout."""
        return 1 / self.most**2 if self.cost is None else self.cost

    def second_wave(self, distance: Tensor, sizes: Tensor) -> Tensor:
        """How many more rollouts each prompt gets, all at once: int64 `[prompts]`. What is planned with is what the
        first wave told; the paper looks again behind each rollout.

        Args:
            distance: estimated squared errors of the priors, for rewards from -1 to 1.
            sizes: rollouts so far.
        """
        wanted = (target(distance, self.price).clamp(max=self.most) - sizes).clamp(min=0)
        if self.extra is None or int(wanted.sum()) <= self.extra:
            return wanted
        steps = torch.arange(int(wanted.max()))
        gains = gain(distance[:, None], sizes[:, None] + steps)  # falling from left to right
        gains = gains.masked_fill(steps >= wanted[:, None], -1.0)
        chosen = torch.zeros_like(gains, dtype=torch.bool)
        chosen.view(-1)[gains.reshape(-1).argsort(descending=True, stable=True)[: self.extra]] = True
        return (chosen & (gains >= 0)).sum(1)

    def wants_more(self, distance: Tensor, sizes: Tensor) -> Tensor:
        """Which prompts draw one more, looked at behind each rollout: bool `[prompts]`."""
        return (gain(distance, sizes) > self.price) & (sizes < self.most)
