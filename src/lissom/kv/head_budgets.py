"""How a total of entries is shared out over KV heads: pure functions (attention matching, appendix on head budgets)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def apportion(shares: torch.Tensor, total: int, least: int, most: int) -> torch.Tensor:
    """Integers that add up to `total`, near to `total * shares`, each in [least, most].

    What a bound takes from or gives to a head is shared out over the others in proportion (water-filling); what
    rounding leaves over goes to the largest remainders.

    Args:
        shares: `[heads]`, non-negative.

    Raises:
        ValueError: the bounds allow no such integers.
    """
    heads = len(shares)
    if not heads * least <= total <= heads * most:
        raise ValueError(f"{total} entries cannot be shared out over {heads} heads with {least} to {most} each.")
    weights = shares.double().clamp(min=1e-12)

    def filled(level: float) -> torch.Tensor:
        return (level * weights).clamp(least, most)

    low, high = 0.0, most / float(weights.min())
    for _ in range(200):  # bisection: the filled total grows with the level
        middle = (low + high) / 2
        low, high = (middle, high) if float(filled(middle).sum()) < total else (low, middle)
    exact = filled(high)
    counts = exact.floor().long().clamp(least, most)
    order = (exact - counts).argsort(descending=True, stable=True).tolist()
    left = total - int(counts.sum())
    while left:
        step = 1 if left > 0 else -1
        for head in order if step > 0 else order[::-1]:
            if left and least <= int(counts[head]) + step <= most:
                counts[head] += step
                left -= step
    return counts


def global_counts(scores: torch.Tensor, total: int, least: int) -> torch.Tensor:
    """Entries per head where the `total` best scores of all heads are kept, at least `least` in each head.

    Args:
        scores: `[heads, entries]`; +inf = always kept, -inf = does not exist.
    """
    # The best `least` of every head are in, whatever the others have.
    first = scores.topk(min(least, scores.shape[1]), dim=-1).indices
    forced = scores.scatter(1, first, torch.inf)
    chosen = forced.flatten().topk(min(total, scores.numel())).indices
    return torch.bincount(chosen // scores.shape[1], minlength=len(scores))


def solve_shares(
    ratios: Sequence[float],
    curves: np.ndarray,
    targets: Sequence[float] = (0.01, 0.02, 0.05, 0.1),
    step: float = 0.001,
) -> np.ndarray:
    """Shares of the total, one per head, that minimise the loss averaged over target ratios (Algorithm 4).

    Starts from equal shares and moves `step` from the head that loses least by it to the head that gains most, while
    that is a net gain. (Greedy from zero gets stuck, because curves can be U-shaped.)

    Args:
        ratios: ascending grid on which the curves were measured.
        curves: `[heads, len(ratios)]`, change of the loss when only this head has that ratio; linear in between, flat
            outside.
        step: as a share of the total.

    Returns:
        `[heads]`, non-negative, sum 1.
    """
    heads = len(curves)
    shares = np.full(heads, 1.0 / heads)

    def loss(head: int, share: float) -> float:
        return float(np.mean(np.interp(np.array(targets) * share * heads, ratios, curves[head])))

    now = np.array([loss(h, shares[h]) for h in range(heads)])
    more = np.array([loss(h, shares[h] + step) for h in range(heads)])
    less = np.array([loss(h, shares[h] - step) if shares[h] >= step else np.inf for h in range(heads)])
    for _ in range(int(10 / step)):
        gain, price = now - more, less - now
        best = int(gain.argmax())
        price[best] = np.inf
        donor = int(price.argmin())
        if not gain[best] - price[donor] > 1e-12:
            break
        for head, change in ((best, step), (donor, -step)):
            shares[head] = max(0.0, shares[head] + change)
            now[head], more[head] = loss(head, shares[head]), loss(head, shares[head] + step)
            less[head] = loss(head, shares[head] - step) if shares[head] >= step else np.inf
    return shares / shares.sum()
