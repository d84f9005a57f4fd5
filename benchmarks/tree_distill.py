"""What a search costs beside the model: its own bookkeeping, and how many states a call of the model is for."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from lissom.devices.machine import describe
from lissom.evals.stats import ratio_interval, verdict
from lissom.report.rows import Claim, Result, Row
from lissom.rl.tasks import Countdown
from lissom.rl.tasks.characters import character_tokenizer
from lissom.rl.tree_search import PolicyWorld, SearchConfig, TransformersDraws, TreeSearch
from lissom.train import new_model


class Timed(PolicyWorld):
    """A world that knows how long it was asked, and for how many states."""

    seconds = 0.0
    calls = 0
    states = 0

    def expand(self, states: Sequence[Any], counts: Sequence[int], seed: int) -> Any:
        """See `PolicyWorld`."""
        return self._timed(super().expand, states, counts, seed)

    def evaluate(self, states: Sequence[Any], seed: int) -> Any:
        """See `PolicyWorld`."""
        return self._timed(super().evaluate, states, seed)

    def _timed(self, asked: Any, states: Sequence[Any], *others: Any) -> Any:
        begin = time.perf_counter()
        try:
            return asked(states, *others)
        finally:
            self.seconds += time.perf_counter() - begin
            self.calls += 1
            self.states += len(states)


def searched(model: Any, tokenizer: Any, trees: int, simulations: int, wave: int) -> tuple[float, Timed]:
    """Seconds of a search over so many prompts, and its world."""
    task = Countdown()
    problems = task.problems("train", trees)
    world = Timed(
        TransformersDraws(model, tokenizer), tokenizer, lambda n, text: task.dense(problems[n], text), 12, 30,
        values=lambda prefixes: [0.0] * len(prefixes),
    )  # fmt: skip
    search = TreeSearch(world, SearchConfig(simulations=simulations, wave=wave, prior="uniform"))
    roots = world.roots([task.prompt(problem) for problem in problems])
    begin = time.perf_counter()
    search(roots)
    return time.perf_counter() - begin, world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    rounds, simulations = (2, 8) if given.quick else (5, 32)
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    model = new_model(len(tokenizer), 96, 4, 4, 4, context=128, tied=True).eval()
    settings = ((1, 1), (1, 4), (16, 1), (16, 4)) if given.quick else ((1, 1), (1, 4), (32, 1), (32, 4), (32, 8))
    rows, shares = [], []
    for trees, wave in settings:
        runs = [searched(model, tokenizer, trees, simulations, wave) for _ in range(rounds + 1)][
            1:
        ]  # the first one warms up
        whole, model_alone = [seconds for seconds, _ in runs], [world.seconds for _, world in runs]
        own = ratio_interval([a - b for a, b in zip(whole, model_alone, strict=True)], whole)
        each = sorted(1e3 * seconds / (trees * simulations) for seconds in whole)[rounds // 2]
        states = runs[0][1].states / runs[0][1].calls
        name = f"{trees} trees, {wave} under way"
        rows.append(Row(f"{name}/simulation", each, "ms", n=rounds))
        rows.append(Row(f"{name}/states of a call", states, ""))
        rows.append(Row(f"{name}/share of the search itself", own.estimate, "", None, None, own.low, own.high, rounds))
        shares.append(own)
        if given.json != "-":
            print(f"{name:24} {each:8.2f} ms a simulation, {states:6.1f} states a call, own {own.estimate:.1%}")
    claims = [
        Claim("a search itself takes at most 10 % of its time, the model the rest", "lissom", verdict(shares, 0.1))
    ]
    result = Result("tree-distill-cost", rows, claims, describe() | {"simulations": simulations})
    if given.json:
        result.write(given.json)
    if given.json != "-":
        for claim in claims:
            print(f"{claim.verdict}: {claim.claim}")


if __name__ == "__main__":
    sys.exit(main())
