"""How far a token's ratio may go before a clipped objective stops rewarding it: Band, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lissom.errors import UserError
from lissom.models.method import check_types
from lissom.rl.band.bounds import known, ratio_bounds
from lissom.rl.band.divergences import Divergence, of_function
from lissom.rl.band.table import table_of


class TokenBounds(Protocol):
    """Bounds of the ratio of the new policy to the old one, for each token."""

    def bounds(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest ratio, fp32, from the old policy's log probability of the sampled tokens, of any
        shape."""
        ...


@dataclass(frozen=True)
class BandConfig:
    """Every ratio that some policy in a trust region around the old one can have (BandPO, arXiv 2603.04918).

    Attributes:
        divergence: whose ball the region is: `kl` (paper: its main one, KL(old || new)), `tv`, `chi-square`; and as
            extensions `reverse-kl`, `hellinger`, or any `Divergence` (see `of_function`).
        radius: of it (paper: 0.05 for all three, which is not equally tight: a small KL ball of radius r is about a
            chi-square ball of 2 r).
        cap: the highest ratio (published code: 10, which is what binds below p = 0.7 % with `kl`); None: what the
            region allows.
        relax: `(below, above)`: what a fixed clip would allow is allowed too (published code: an option that was off in
            the main runs). None: no.
        exact: solve for every token in float64, rather than look up a table that differs by less than a thousandth.

    Raises:
        UserError: a value is out of range.
    """

    divergence: str | Divergence = "kl"
    radius: float = 0.05
    cap: float | None = 10.0
    relax: tuple[float, float] | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.relax, list):  # of YAML
            object.__setattr__(self, "relax", tuple(self.relax))
        if isinstance(self.divergence, str):
            check_types(self)
        known(self.divergence)
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise UserError(f"radius={self.radius}: expected a number above 0.")
        if self.cap is not None and not self.cap > 1:
            raise UserError(f"cap={self.cap}: expected a ratio above 1.")
        if self.relax is not None and (len(self.relax) != 2 or not (0 <= self.relax[0] <= 1 and self.relax[1] >= 0)):
            raise UserError(f"relax={self.relax}: expected how far below 1 (up to 1) and above it a fixed clip goes.")

    def bounds(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenBounds`."""
        if not self.exact:
            return table_of(self.divergence, self.radius)(logp, self.cap, self.relax)
        below, above = self.relax or (0.0, 0.0)
        lower, upper = ratio_bounds(logp, self.divergence, self.radius)
        return lower.clamp(max=1 - below).float(), upper.clamp(min=1 + above).clamp(max=self.cap or math.inf).float()

    def __str__(self) -> str:
        name = self.divergence if isinstance(self.divergence, str) else self.divergence.name
        return f"band {name} {self.radius:g}"


@dataclass(frozen=True)
class FixedClip:
    """The same bounds for every token: PPO's clip, and with more room above it DAPO's Clip-Higher (arXiv 2503.14476).

    Attributes:
        low, high: how far the ratio may go below and above 1.

    Raises:
        UserError: a value is out of range.
    """

    low: float = 0.2
    high: float = 0.28

    def __post_init__(self) -> None:
        check_types(self)
        if not (0 <= self.low <= 1 and 0 <= self.high < math.inf):
            raise UserError(f"low={self.low}, high={self.high}: expected 0 to 1, and a number from 0.")

    def bounds(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenBounds`."""
        like = logp.detach().float()
        return torch.full_like(like, 1 - self.low), torch.full_like(like, 1 + self.high)

    def __str__(self) -> str:
        return f"clip {self.low:g}/{self.high:g}"


@dataclass(frozen=True)
class DynamicClip:
    """DCPO's bounds (arXiv 2509.02333), which widen for rare tokens by a closed form that follows from no trust region:
    of likely tokens they leave the simplex.

    Attributes:
        low, high: what they widen by.
        cap: the highest ratio.

    Raises:
        UserError: a value is out of range.
    """

    low: float = 0.16
    high: float = 0.2
    cap: float | None = 10.0

    def __post_init__(self) -> None:
        check_types(self)
        if not (0 <= self.low < math.inf and 0 <= self.high < math.inf):
            raise UserError(f"low={self.low}, high={self.high}: expected numbers from 0.")
        if self.cap is not None and not self.cap > 1:
            raise UserError(f"cap={self.cap}: expected a ratio above 1.")

    def bounds(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenBounds`."""
        inverse = (-logp.detach().double()).exp()
        lower = 0.5 + 0.5 * (1 - 4 * self.low * inverse).clamp(min=0).sqrt()
        upper = (0.5 + 0.5 * (1 + 4 * self.high * inverse).sqrt()).clamp(max=self.cap or math.inf)
        return lower.float(), upper.float()

    def __str__(self) -> str:
        return f"dcpo {self.low:g}/{self.high:g}"


@dataclass(frozen=True)
class ProbabilityMask:
    """DPPO's mask: a token whose probability has moved too far in the direction of its advantage gives no gradient.

    A clip at the same place has the same gradient, so it is one here: with `low` = `high` that of
    `BandConfig("tv", radius=high, cap=None)`.

    Attributes:
        low, high: how far the probability itself may fall and rise.

    Raises:
        UserError: a value is out of range.
    """

    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        check_types(self)
        if not (0 < self.low <= 1 and 0 < self.high <= 1):
            raise UserError(
                f"low={self.low}, high={self.high}: expected differences of probabilities, above 0 up to 1."
            )

    def bounds(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenBounds`."""
        return ratio_bounds(logp, "tv", self.low)[0].float(), ratio_bounds(logp, "tv", self.high)[1].float()

    def __str__(self) -> str:
        return f"dppo {self.low:g}/{self.high:g}"


def band(
    logp: Tensor,
    divergence: str | Divergence | Callable[[Tensor], Tensor] = "kl",
    radius: float = 0.05,
    *,
    cap: float | None = None,
    relax: tuple[float, float] | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """The lowest and the highest ratio to the old probability that a sampled token can have in any distribution within
    `radius` of the old one (arXiv 2603.04918).

    Args:
        logp: the old policy's log probability of sampled tokens, of any shape. No gradient goes through it.
        divergence, radius, relax, exact: see `BandConfig`; `divergence` may also be the convex function itself.
        cap: see `BandConfig`; here there is none by default.

    Returns:
        `lower`, from 0 to 1, and `upper`, from 1 to 1 / p where there is no cap: fp32 of the shape of `logp`.

    Raises:
        UserError: a value is out of range, or the function is none of a divergence.
    """
    if callable(divergence):
        divergence = of_function(divergence)
        exact = True  # a table is worth its making where it is used again
    return BandConfig(divergence, radius, cap, relax, exact).bounds(logp)


BOUNDS: dict[str, Callable[..., TokenBounds]] = {
    "band": BandConfig, "clip": FixedClip, "dcpo": DynamicClip, "dppo": ProbabilityMask,
}  # fmt: skip
