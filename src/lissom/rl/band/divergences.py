"""f-divergences between the old policy and the new, as far as one token feels them.

For `D_f = E_old[f(new / old)]` over a whole vocabulary, convex `f` with `f(1) = 0`, and one token whose probability
goes from `p` to `q`, the cheapest that the other tokens can do is to scale by one factor, by Jensen's inequality (arXiv
2603.04918). What it then costs is the divergence of two outcomes, the token and the rest:
`g(p, q) = p f(q / p) + (1 - p) f((1 - q) / (1 - p))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lissom.errors import UserError


class Odds(NamedTuple):
    """A token's probability in a form that is exact near 0 and near 1.

    Attributes:
        log: of the probability.
        log_rest: of what all others have together.
    """

    log: Tensor
    log_rest: Tensor

    @staticmethod
    def of_logit(logit: Tensor) -> Odds:
        """From log(p / (1 - p)), of which both ends may be infinite."""
        return Odds(torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit))

    @staticmethod
    def of_log(log: Tensor) -> Odds:
        """From log p, below 0."""
        return Odds(log, torch.log(-torch.expm1(log)))

    @property
    def logit(self) -> Tensor:
        """log(p / (1 - p))."""
        return self.log - self.log_rest


Cost = Callable[[Odds, Odds], Tensor]


@dataclass(frozen=True)
class Divergence:
    """An f-divergence.

    Attributes:
        name: of it.
        cost: `g` of the old odds and the new ones, float64, of any one shape.
        bounds: the lowest and the highest logit within a radius, from the old odds, where there is a closed form.
    """

    name: str
    cost: Cost
    bounds: Callable[[Odds, float], tuple[Tensor, Tensor]] | None = None


def of_function(f: Callable[[Tensor], Tensor], name: str | None = None) -> Divergence:
    """The divergence of any `f`, elementwise on float64 tensors of ratios from 0 (where it may be infinite).

    Raises:
        UserError: `f(1)` is not 0, or it is not convex.
    """
    ratios = torch.cat([torch.zeros(1), torch.logspace(-4, 4, 161)]).double()
    ratios[81] = 1.0
    values = f(ratios.clone())
    label = name or str(getattr(f, "__name__", "f"))
    if values.shape != ratios.shape or values.isnan().any():
        raise UserError(f"The divergence {label} does not give one number for each ratio from 0.")
    if abs(float(values[81])) > 1e-9:
        raise UserError(f"The divergence {label} is {float(values[81]):g} at a ratio of 1: expected 0.")
    share = (ratios[2:] - ratios[1:-1]) / (ratios[2:] - ratios[:-2])
    chord = share * values[:-2] + (1 - share) * values[2:]
    if bool((values[1:-1] > chord + 1e-9 * (1 + chord.abs())).any()):
        raise UserError(f"The divergence {label} is not convex.")

    def cost(old: Odds, new: Odds) -> Tensor:
        rest = old.log_rest.exp() * f((new.log_rest - old.log_rest).exp())
        return (old.log.exp() * f((new.log - old.log).exp()) + rest).nan_to_num(nan=torch.inf, posinf=torch.inf)

    return Divergence(label, cost)


def _kl(old: Odds, new: Odds) -> Tensor:
    return old.log.exp() * (old.log - new.log) + old.log_rest.exp() * (old.log_rest - new.log_rest)


def _reverse_kl(old: Odds, new: Odds) -> Tensor:
    def part(before: Tensor, after: Tensor) -> Tensor:
        return torch.where(after.isneginf(), 0.0, after.exp() * (after - before))

    return part(old.log, new.log) + part(old.log_rest, new.log_rest)


def _difference(old: Odds, new: Odds) -> Tensor:
    """Of the probabilities; of the smaller of a token and the rest, whose digits are all there."""
    rare = old.log < old.log_rest
    before, after = (torch.where(rare, odds.log, odds.log_rest) for odds in (old, new))
    return (after.exp() - before.exp()).abs()


def _chi_square(old: Odds, new: Odds) -> Tensor:
    return _difference(old, new).square() * (-old.log - old.log_rest).exp()


def _hellinger(old: Odds, new: Odds) -> Tensor:
    return ((old.log / 2).exp() - (new.log / 2).exp()).square() + (
        (old.log_rest / 2).exp() - (new.log_rest / 2).exp()
    ).square()


def _moved(old: Odds, step: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of p - step and p + step, as far as they are probabilities."""
    p, rest = old.log.exp(), old.log_rest.exp()
    lower = (p - step).clamp(min=0).log() - (rest + step).log()
    return lower, (p + step).log() - (rest - step).clamp(min=0).log()


def _of_angles(old: Odds, radius: float) -> tuple[Tensor, Tensor]:
    """Where probabilities are squared sines, Hellinger's distance is an angle."""
    here = torch.atan2((old.log / 2).exp(), (old.log_rest / 2).exp())
    turn = 2 * math.asin(min(1.0, math.sqrt(radius) / 2))
    lower, upper = (here - turn).clamp(min=0), torch.pi / 2 - (here + turn).clamp(max=torch.pi / 2)
    return 2 * lower.tan().log(), -2 * upper.tan().log()


DIVERGENCES = {
    divergence.name: divergence
    for divergence in (
        Divergence("kl", _kl),
        Divergence("tv", _difference, lambda old, radius: _moved(old, torch.full_like(old.log, radius))),
        Divergence(
            "chi-square",
            _chi_square,
            lambda old, radius: _moved(old, (radius * (old.log + old.log_rest).exp()).sqrt()),
        ),
        Divergence("reverse-kl", _reverse_kl),
        Divergence("hellinger", _hellinger, _of_angles),
    )
}
