"""A softmax bandit in which the best action is a rare one: what a clip does to exploration, without a language model.

Each context has actions of its own, with logits that are trained by plain gradient ascent on the clipped objective of
groups, several inner steps for each batch of draws. It takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lissom.rl.band.config import TokenBounds


@dataclass(frozen=True)
class Bandit:
    """Sizes of it.

    Attributes:
        contexts, actions: how many.
        rank: of the best action by its first probability, from 0; its reward is 1.
        spread: standard deviation of the first logits.
        other: the highest reward of the other actions, which are drawn uniformly from 0 to it.
        group: draws of a context in an iteration, whose rewards are compared.
        inner_steps: steps for each batch of draws. With one, all ratios are 1 and clips do nothing.
        iterations: batches of draws.
        learning_rate: of plain gradient ascent.
    """

    contexts: int = 64
    actions: int = 50
    rank: int = 12
    spread: float = 2.0
    other: float = 0.6
    group: int = 8
    inner_steps: int = 4
    iterations: int = 150
    learning_rate: float = 1.0


@dataclass(frozen=True)
class Played:
    """What became of it.

    Attributes:
        returns: expected reward at the end, mean over contexts.
        best: probability of the best action.
        entropy: of the policy, nats.
        clipped: share of draws without a gradient in the last inner step, mean over iterations.
    """

    returns: float
    best: float
    entropy: float
    clipped: float


def play(bandit: Bandit, bounds: TokenBounds | None, seed: int) -> Played:
    """Train on it; draws depend on the seed and on the policy alone.

    Args:
        bounds: None: there are none.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (bandit.contexts, bandit.actions)
    logits = bandit.spread * torch.randn(shape, generator=random)
    best = logits.argsort(1, descending=True)[:, bandit.rank : bandit.rank + 1]
    rewards = (bandit.other * torch.rand(shape, generator=random)).scatter(1, best, 1.0)
    shares = []
    for _ in range(bandit.iterations):
        old = logits.log_softmax(1)
        drawn = torch.multinomial(old.exp(), bandit.group, replacement=True, generator=random)
        logp, reward = old.gather(1, drawn), rewards.gather(1, drawn)
        advantages = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        limits = (torch.zeros_like(logp), torch.full_like(logp, torch.inf)) if bounds is None else bounds.bounds(logp)
        for _ in range(bandit.inner_steps):
            logits, share = _step(bandit, logits, drawn, logp, advantages, limits)
        shares.append(share)
    policy = logits.softmax(1)
    entropy = -torch.special.xlogy(policy, policy).sum(1).mean()
    return Played(
        float((policy * rewards).sum(1).mean()), float(policy.gather(1, best).mean()), float(entropy),
        sum(shares) / len(shares),
    )  # fmt: skip


def _step(
    bandit: Bandit, logits: Tensor, drawn: Tensor, old: Tensor, advantages: Tensor, limits: tuple[Tensor, Tensor]
) -> tuple[Tensor, float]:
    logits = logits.detach().requires_grad_()
    ratio = (logits.log_softmax(1).gather(1, drawn) - old).exp()
    terms = torch.minimum(ratio * advantages, ratio.clamp(*limits) * advantages)
    (gradient,) = torch.autograd.grad(terms.mean(1).sum(), logits)
    beyond = ((ratio > limits[1]) & (advantages > 0)) | ((ratio < limits[0]) & (advantages < 0))
    return logits.detach() + bandit.learning_rate * gradient, float(beyond.float().mean())
