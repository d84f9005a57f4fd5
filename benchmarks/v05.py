"""What V_0.5 costs beside the rollouts: prior, fusion and plan of a step, against generating and training on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lissom.devices.machine import describe
from lissom.evals.stats import Interval, ratio_interval, verdict
from lissom.evals.training_steps import rounds_of, step
from lissom.report.rows import Claim, Result, Row
from lissom.rl.sampling import sample
from lissom.rl.tasks import Countdown
from lissom.rl.tasks.characters import character_tokenizer
from lissom.rl.value_prior import Budget, Fusion, GaussianProcess, History, Neighbours, Outcome, Ridge, Rollouts
from lissom.rl.value_prior.features import features_of
from lissom.train import new_model

GENERATE, TRAIN, FEATURES, FUSION = "generating", "training", "features of prompts", "fusion and plan"
SIZE, STEPS = 4, 8  # rollouts of a prompt, and steps whose outcomes a prior has seen


def works(prompts: int, hidden: int) -> dict[str, Callable[[], Any]]:
    """Everything that a step with so many prompts does, by name."""
    random, tokenizer, task = np.random.default_rng(0), character_tokenizer(), Countdown()
    model = new_model(len(tokenizer), hidden, 4, 4, 4, context=128, tied=True)
    texts = [task.prompt(problem) for problem in task.problems("train", prompts)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(3, len(tokenizer), (prompts * SIZE, 32))
    context = [
        Outcome(f"p{n}", random.normal(size=hidden), float(random.random()), SIZE, n // prompts)
        for n in range(prompts * STEPS)
    ]
    fresh = random.normal(size=(prompts, hidden))
    owner = torch.arange(prompts).repeat_interleave(SIZE)
    rewards = torch.from_numpy(random.integers(0, 2, prompts * SIZE).astype(float))
    rollouts = Rollouts(rewards, owner, torch.from_numpy(random.random(prompts)), 0.0, 1.0)
    found: dict[str, Callable[[], Any]] = {
        GENERATE: lambda: sample(model, tokenizer, texts, SIZE, 20),
        TRAIN: lambda: step(model, optimizer, ids),
        FEATURES: lambda: features_of(model, tokenizer, texts),
        FUSION: lambda: Budget().second_wave(Fusion().fused(rollouts).distance * 4, rollouts.sizes),
    }
    for prior in (GaussianProcess(), Ridge(), Neighbours(), History()):
        found[type(prior).__name__] = lambda prior=prior: prior.predict(texts, fresh, context)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    prompts, hidden, rounds = (16, 64, 5) if given.quick else (64, 96, 15)
    seconds = rounds_of(works(prompts, hidden), rounds)
    rows, shares = [], {}
    base = [a + b for a, b in zip(seconds[GENERATE], seconds[TRAIN], strict=True)]
    for name, taken in seconds.items():
        share = ratio_interval(taken, base)
        shares[name] = share
        rows.append(
            Row(name, 1e3 * float(np.median(taken)), "ms", 1e3 * float(np.median(base)), 1 / share.estimate,
                1 / share.high, 1 / share.low, rounds)
        )  # fmt: skip
    whole = ratio_interval(
        [sum(parts) for parts in zip(*(seconds[name] for name in (FEATURES, FUSION, "GaussianProcess")), strict=True)],
        base,
    )
    claims = [
        Claim(f"prior, fusion and plan take at most 10 % of a step: {_share(whole)}", "lissom", verdict([whole], 0.1))
    ]
    result = Result("v05-cost", rows, claims, describe() | {"prompts": prompts, "hidden": hidden})
    if given.json:
        result.write(given.json)
    if given.json != "-":
        for row in rows:
            print(f"{row.name:24} {row.value:9.2f} ms {_share(shares[row.name])} of generating and training")
        for claim in claims:
            print(f"{claim.verdict}: {claim.claim}")


def _share(share: Interval) -> str:
    return f"{share.estimate:.1%} [{share.low:.1%}, {share.high:.1%}]"


if __name__ == "__main__":
    sys.exit(main())
