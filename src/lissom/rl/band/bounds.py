"""How far the probability of a sampled token may go, as a ratio to what it was."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lissom.errors import UserError
from lissom.rl.band.divergences import DIVERGENCES, Divergence, Odds

_LEAST = -700.0  # log probability: below it ratios are no longer numbers
_MOST = -1e-300
_DOUBLINGS, _HALVINGS = 64, 70


def known(divergence: str | Divergence) -> Divergence:
    """A divergence by its name.

    Raises:
        UserError: there is none of that name.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if divergence not in DIVERGENCES:
        raise UserError(f"divergence={divergence!r}: expected {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[divergence]


def logit_bounds(logp: Tensor, divergence: str | Divergence, radius: float) -> tuple[Tensor, Tensor]:
    """The lowest and the highest log(q / (1 - q)) of a token that had `logp`, float64; infinite where 0 or 1 is within
    the radius. In this form they solve `g = radius` to the last digits, also where the ratio no longer tells them
    apart.

    Args:
        logp: log probabilities of any shape.
        radius: what the divergence may be, in nats for the Kullback-Leibler ones.

    Raises:
        UserError: the radius is not a number above 0, or there is no such divergence.
    """
    rule = known(divergence)
    if not (math.isfinite(radius) and radius > 0):
        raise UserError(f"radius={radius}: expected a number above 0.")
    old = Odds.of_log(logp.detach().double().clamp(_LEAST, _MOST))
    if rule.bounds is not None:
        return rule.bounds(old, radius)
    return _outermost(rule, old, radius, -1), _outermost(rule, old, radius, 1)


def _outermost(rule: Divergence, old: Odds, radius: float, side: int) -> Tensor:
    """By bisection on the distance in logits, over which the cost rises; without a look at values, which would make an
    accelerator wait."""
    start = old.logit

    def within(distance: Tensor) -> Tensor:
        return rule.cost(old, Odds.of_logit(start + side * distance)) <= radius

    near, far = torch.zeros_like(start), torch.ones_like(start)
    for _ in range(_DOUBLINGS):
        reaches = within(far)
        near, far = torch.where(reaches, far, near), torch.where(reaches, 2 * far, far)
    for _ in range(_HALVINGS):
        middle = (near + far) / 2
        reaches = within(middle)
        near, far = torch.where(reaches, middle, near), torch.where(reaches, far, middle)
    endless = within(torch.full_like(start, torch.inf))
    return start + side * torch.where(endless, torch.inf, near)


def ratio_bounds(logp: Tensor, divergence: str | Divergence, radius: float) -> tuple[Tensor, Tensor]:
    """The same as ratios q / p, float64: lower in [0, 1], upper in [1, 1 / p]."""
    lower, upper = logit_bounds(logp, divergence, radius)
    before = logp.detach().double().clamp(_LEAST, _MOST)
    ratios = [(torch.nn.functional.logsigmoid(logit) - before).exp() for logit in (lower, upper)]
    unknown = logp.isnan()
    return (
        ratios[0].clamp(max=1).masked_fill(unknown, torch.nan),
        ratios[1].clamp(min=1).masked_fill(unknown, torch.nan),
    )
