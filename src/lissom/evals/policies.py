"""What studies of learning from reward share: the policy that all arms begin with, a run of one, and rates for them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.arms import train_missing
from lissom.evals.journal import Journal, digest
from lissom.evals.stats import Interval, mean_interval
from lissom.rl.tasks import NumberTask
from lissom.rl.world import World
from lissom.train.align import AlignConfig, Settings, align
from lissom.train.run import without_noise
from lissom.train.warm_start import WarmStart, facts_of, warm_start

Progress = Callable[[int, int], None]


def first_policy(
    model: str | None, task: NumberTask, start: WarmStart, journal: Path, progress: Progress
) -> tuple[str, dict[str, float]]:
    """The folder of the policy that all arms begin with, and its `parameters`.

    Args:
        model: its folder; None: it is trained, beside the journal.
    """
    if model is None:
        folder = journal.with_suffix("") / digest(facts_of(task, start))
        if not (folder / "config.json").exists():
            warm_start(task, folder, start, progress)
        model = str(folder)
    network, _ = loaded(model)
    return model, {"parameters": float(sum(p.numel() for p in network.parameters()))}


def loaded(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A policy and its tokenizer, without a bar."""
    with without_noise():
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def identity_facts(folder: str, task: NumberTask, start: WarmStart) -> tuple[str, dict[str, object]]:
    """What a measurement depends on of the policy."""
    return (Path(folder) / "config.json").read_text(), facts_of(task, start)


@dataclass(frozen=True)
class Learned:
    """A run's log.

    Attributes:
        curve: of held-out prompts: [tokens generated, mean@K, pass@K], in order.
        steps: entries of batches of rollouts.
    """

    curve: list[list[float]]
    steps: list[dict[str, float]]

    def mean_of(self, name: str, last: float = 1.0) -> float | None:
        """Of a metric over the last share of the steps, where it is known; None where it never is."""
        steps = self.steps[-max(1, int(len(self.steps) * last)) :]
        values = [entry[name] for entry in steps if entry.get(name) is not None]
        return float(np.mean(values)) if values else None


def learn(folder: str, config: AlignConfig, world: World, settings: Settings | None) -> Learned:
    """Let the policy in `folder` learn, and keep nothing but the log."""
    model, tokenizer = loaded(folder)
    with tempfile.TemporaryDirectory() as output:
        history = align(config, model, tokenizer, world, Path(output), settings)
    measured = f"mean@{config.eval_completions}", f"best@{config.eval_completions}"
    points = [entry for entry in history if measured[0] in entry]
    curve = [[entry["tokens/generated"], *(entry[name] for name in measured)] for entry in points]
    return Learned(curve, [entry for entry in history if "loss" in entry])


def tuned(
    arms: Sequence[str],
    rates: Sequence[float],
    job: Callable[[str, float], tuple[str, tuple[Any, ...]]],
    trained: Callable[..., dict[str, Any]],
    known: Journal,
    progress: Progress,
) -> dict[str, Any]:
    """For each arm the learning rate that ends at the highest `mean`, and `tuning`: all that was tried.

    Args:
        job: identity of the run of an arm at a rate, and arguments of `trained`.
    """
    made = {(arm, rate): job(arm, rate) for rate in rates for arm in arms}
    train_missing(dict(made.values()), trained, known, progress)
    found: dict[str, Any] = {"tuning": {arm: {} for arm in arms}}
    for (arm, rate), (identity, _) in made.items():
        found["tuning"][arm][rate] = known[identity]["mean"]
    return found | {arm: max(reached, key=reached.get) for arm, reached in found["tuning"].items()}


def by_arm(
    arms: Sequence[str],
    seeds: Sequence[int],
    job: Callable[[str, int], tuple[str, tuple[Any, ...]]],
    trained: Callable[..., dict[str, Any]],
    known: Journal,
    progress: Progress,
) -> dict[str, list[dict[str, Any]]]:
    """One record of `trained` per arm and seed, those that `known` has not made in the order of seeds.

    Args:
        job: identity of the run of an arm and seed, and arguments of `trained`.
    """
    made = {(arm, seed): job(arm, seed) for seed in seeds for arm in arms}
    train_missing(dict(made.values()), trained, known, progress)
    return {arm: [known[made[arm, seed][0]] for seed in seeds] for arm in arms}


class Arms:
    """Figures of arms, one number per seed."""

    trained: Mapping[str, Sequence[Mapping[str, Any]]]

    def final(self, arm: str, what: str) -> np.ndarray:
        """A figure of an arm's records; NaN where it has none."""
        return np.array([record[what] for record in self.trained[arm]], float)

    def gap(self, arm: str, base: str, what: str) -> Interval:
        """Of a figure, paired by seed."""
        return mean_interval(self.final(arm, what) - self.final(base, what))
