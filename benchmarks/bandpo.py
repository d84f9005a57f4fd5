"""What bounds cost: looked up, solved, and as part of the clipped loss with its gradient, beside a fixed clip."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch

from lissom.devices.machine import describe
from lissom.evals.checks.bandpo import clipped_loss
from lissom.evals.stats import ratio_interval, verdict
from lissom.evals.training_steps import rounds_of
from lissom.report.rows import Claim, Result, Row
from lissom.rl.band.config import BandConfig, DynamicClip, FixedClip, TokenBounds
from lissom.rl.band.divergences import DIVERGENCES

FIXED, SOURCE = "clip 0.2/0.28", "lissom"
_SOLVED = 1 << 14  # tokens that the solver is timed with: it is thousands of times slower


def arms() -> dict[str, TokenBounds]:
    """What is timed, by name."""
    found: dict[str, TokenBounds] = {FIXED: FixedClip(), "dcpo": DynamicClip()}
    for name in DIVERGENCES:
        found[f"band {name}"] = BandConfig(name)
        found[f"band {name}, solved"] = BandConfig(name, exact=True)
    return found


def timed(tokens: int, rounds: int) -> list[Row]:
    """Bounds alone, and the loss with its gradient."""
    random = torch.Generator().manual_seed(0)
    old = -4 * torch.rand(tokens, generator=random)
    new, advantages = old + 0.1 * torch.randn(tokens, generator=random), torch.randn(tokens, generator=random)
    few = min(tokens, _SOLVED)
    bounds: dict[str, Any] = {"clip": partial((new - old).exp().clamp, 0.8, 1.28)}
    losses: dict[str, Any] = {FIXED: lambda: clipped_loss(new, old, advantages, 0.8, 1.28)}
    for name, arm in arms().items():
        count = few if name.endswith("solved") else tokens
        bounds[name] = lambda arm=arm, count=count: arm.bounds(old[:count])
        if count == tokens and name != FIXED:
            losses[name] = lambda arm=arm: clipped_loss(new, old, advantages, *arm.bounds(old))
    rows = []
    for kind, works, base in (("bounds", bounds, "clip"), ("loss", losses, FIXED)):
        seconds = rounds_of(works, rounds)
        for name in works:
            scale = tokens / few if name.endswith("solved") else 1.0
            own = [scale * taken for taken in seconds[name]]
            cost = ratio_interval(own, seconds[base])
            milliseconds = [1e3 * sorted(taken)[len(taken) // 2] for taken in (own, seconds[base])]
            rows.append(
                Row(f"{kind}/{tokens}/{name}", milliseconds[0], "ms", milliseconds[1], 1 / cost.estimate, 1 / cost.high,
                    1 / cost.low, rounds)
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    sizes = (1 << 16,) if given.quick else (1 << 14, 1 << 20)
    rows = [row for tokens in sizes for row in timed(tokens, 7 if given.quick else 21)]
    claims = []
    for kind, words in (
        ("bounds", "Band's bounds by the table"),
        ("loss", "the clipped loss with its gradient by the table"),
    ):
        own = [row for row in rows if row.name.endswith("/band kl") and row.name.startswith(kind)]
        costs = [1 / row.ratio for row in own if row.ratio]
        found = [ratio_interval([row.value], [row.baseline or 1.0]) for row in own]
        claims.append(
            Claim(f"{words}: at most 3 times a fixed clip: {', '.join(f'{cost:.2f}' for cost in costs)} times", SOURCE,
                  verdict(found, 3.0))
        )  # fmt: skip
    result = Result("bandpo-cost", rows, claims, describe())
    if given.json:
        result.write(given.json)
    if given.json != "-":
        for row in rows:
            print(f"{row.name:44} {row.value:10.3f} ms {1 / (row.ratio or 1):10.2f} times")
        for claim in claims:
            print(f"{claim.verdict}: {claim.claim}")


if __name__ == "__main__":
    sys.exit(main())
