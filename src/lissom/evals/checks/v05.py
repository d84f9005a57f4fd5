"""Whether a prior and a few rollouts are a better baseline than more rollouts: a simulation, and a small policy.

In the simulation rewards of -1 and 1 have U-shaped means, and priors are off in ways that are known: what a baseline's
error is, how many prompts teach nothing, and what budgets buy can be measured to any precision. The policy has learned
the format of Countdown, and learns from reward in TRL's trainer: arms differ in their baseline and in how they spend
rollouts, and end at as many generated tokens. Two arms have a prior that is meant to do harm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lissom.evals.journal import Journal, scope_of
from lissom.evals.policies import Arms, by_arm, first_policy, identity_facts, learn, tuned
from lissom.evals.stats import signed, verdict
from lissom.rl.tasks import Countdown
from lissom.rl.value_prior import (
    Baseline,
    Budget,
    Constant,
    Flipped,
    Fusion,
    GaussianProcess,
    History,
    Mean,
    PriorOnly,
    Rollouts,
    ShrinkToBatch,
    ValuePriorConfig,
)
from lissom.rl.world import task_world
from lissom.train.align import AlignConfig, Method
from lissom.train.config import TrainConfig
from lissom.train.warm_start import WarmStart

STAGES = ("policy", "tuning", "learning")
GRPO_4, GRPO_16, DAPO = "GRPO, 4 rollouts", "GRPO, 16 rollouts", "DAPO's filter, 4 rollouts"
SHRUNK, FIXED, V05 = "shrunk to the batch, 4", "V_0.5, 4 rollouts", "V_0.5, 4 to 16"
HISTORY, FLIPPED, CONSTANT = "V_0.5, history", "V_0.5, flipped prior", "V_0.5, constant prior"
OURS, PAPER_SOURCE = "lissom", "arXiv 2603.10848"
_NONE = Constant(0.5)  # where the baseline asks for no prior


def settings_of(arm: str) -> ValuePriorConfig | None:
    """Baseline, prior and budget of an arm; None: TRL's own GRPO."""
    known: dict[str, ValuePriorConfig | None] = {
        GRPO_4: None,
        GRPO_16: None,
        DAPO: ValuePriorConfig(Mean(), _NONE, None, drop_silent=True),
        SHRUNK: ValuePriorConfig(ShrinkToBatch(), _NONE, None),
        FIXED: ValuePriorConfig(Fusion(), GaussianProcess(), None),
        V05: ValuePriorConfig(Fusion(), GaussianProcess(), Budget()),
        HISTORY: ValuePriorConfig(Fusion(), History(), Budget()),
        FLIPPED: ValuePriorConfig(Fusion(), Flipped(GaussianProcess(), 0.0, 1.0), Budget()),
        CONSTANT: ValuePriorConfig(Fusion(), Constant(1.0), Budget()),
    }
    return known[arm]


ARMS = (GRPO_4, GRPO_16, V05, FIXED, DAPO, SHRUNK, HISTORY, FLIPPED, CONSTANT)


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        config: of learning; its method, seed, learning rate, prompts and rollouts are the arm's.
        arms: that learn, of `ARMS`.
        seeds: of the order of prompts and of rollouts, the units of all intervals.
        rates: learning rates that are tried for `GRPO_4` and for `V05` on another seed; other arms have that of the one
            they are like.
        tuning: share of the tokens that those runs have.
        task, policy: what is learned, and what learns.
        held_out: problems that are measured.
        rollouts: of a step, about.
        draws: prompts of the simulation.
    """

    config: AlignConfig
    arms: Sequence[str]
    seeds: Sequence[int]
    rates: Sequence[float]
    tuning: float
    task: Countdown = Countdown()  # noqa: RUF009
    policy: WarmStart = field(default_factory=WarmStart)
    held_out: int = 200
    rollouts: int = 256
    draws: int = 200_000


_LENGTH = 18  # tokens of a completion, about


def _learning(steps: int) -> AlignConfig:
    """Enough steps for every arm to spend its tokens: those with four rollouts and no more have the most."""
    return AlignConfig(
        steps=2 * steps, token_budget=steps * 256 * _LENGTH, minibatches=4, max_completion_length=24,
        scale_rewards="none", eval_steps=max(1, steps // 6), save_steps=2 * steps,
    )  # fmt: skip


_TINY = TrainConfig(steps=4, batch_size=2, context=64, warmup_steps=1, eval_steps=4, save_steps=4, logging_steps=2)
QUICK = Size(
    replace(_learning(2), token_budget=300, minibatches=2), (GRPO_4, V05), (0, 1), (1e-4, 3e-4), 0.5,
    policy=WarmStart(hidden=32, layers=1, heads=2, traces=1000, config=_TINY), held_out=8, rollouts=16, draws=2000,
)  # fmt: skip
SMALL = Size(_learning(30), (GRPO_4, GRPO_16, V05), (0, 1, 2), (5e-5, 1e-4), 0.4, held_out=100)
DEFAULT = Size(_learning(80), ARMS, (0, 1, 2), (5e-5, 1e-4, 2e-4), 0.4)
PAPER = Size(
    replace(_learning(1000), token_budget=200_000_000, max_completion_length=64),
    ARMS, (0, 1, 2), (3e-6, 1e-5, 3e-5), 0.1,
    Countdown(numbers=4, largest=13), WarmStart(hidden=768, layers=12, heads=12, traces=1_000_000), 820, 2048,
)  # fmt: skip


@dataclass(frozen=True)
class Run(Arms):
    """What a check measured.

    Attributes:
        errors: mean squared error of baselines in the simulation, by prior and baseline.
        silent: share of prompts without a gradient there, by baseline, with the mixed prior.
        budgets: by way of spending rollouts: mean size and error, with the mixed prior.
        policy: `parameters` of the one that all begin with.
        rates: by `GRPO_4` and `V05` the tuned learning rate, and `tuning`: mean@K by arm and rate.
        trained: by arm, one record per seed: see `_trained`.
    """

    size: Size
    errors: Mapping[str, Mapping[str, float]]
    silent: Mapping[str, float]
    budgets: Mapping[str, tuple[float, float]]
    policy: Mapping[str, float]
    rates: Mapping[str, Any]
    trained: Mapping[str, Sequence[Mapping[str, Any]]]


def run(
    model: str | None,
    size: Size,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Run:
    """The whole check; a run that was stopped goes on behind the last arm and seed in `journal`.

    Args:
        model: folder of a policy in characters that all arms begin with; None: one is trained.
    """
    known = Journal(journal)
    folder, facts = first_policy(model, size.task, size.policy, journal, partial(progress, STAGES[0]))
    budget = round((size.config.token_budget or 0) * size.tuning)

    def tuning(arm: str, rate: float) -> tuple[str, tuple[Any, ...]]:
        seed = max(size.seeds) + 1000
        config = replace(size.config, seed=seed, learning_rate=rate, token_budget=budget)
        return f"tuning/{_identity(size, folder, arm, config)}", (arm, config, size, folder)

    rates = tuned((GRPO_4, V05), size.rates, tuning, _trained, known, partial(progress, STAGES[1]))

    def learning(arm: str, seed: int) -> tuple[str, tuple[Any, ...]]:
        config = replace(size.config, seed=seed, learning_rate=rates[V05 if "V_0.5" in arm else GRPO_4])
        return _identity(size, folder, arm, config), (arm, config, size, folder)

    trained = by_arm(size.arms, size.seeds, learning, _trained, known, partial(progress, STAGES[2]))
    errors, silent, budgets = simulate(size.draws)
    return Run(size, errors, silent, budgets, facts, rates, trained)


Errors = dict[str, dict[str, float]]


def simulate(draws: int, seed: int = 0) -> tuple[Errors, dict[str, float], dict[str, tuple[float, float]]]:
    """Errors of baselines with four rollouts by how far the prior is off; shares of silent prompts; and budgets."""
    random = np.random.default_rng(seed)
    truth = 2 * random.beta(0.5, 0.5, draws) - 1
    priors = {f"error {off:g}": truth + off * random.standard_normal(draws) for off in (0.1, 0.3, 0.5, 0.8)}
    wild = random.random(draws) < 0.2
    priors[MIXED] = np.where(wild, random.uniform(-1, 1, draws), truth + 0.15 * random.standard_normal(draws))
    right = np.where(random.random((draws, 16)) < ((truth + 1) / 2)[:, None], 1.0, -1.0)
    baselines: dict[str, Baseline] = {
        "prior": PriorOnly(),
        "mean": Mean(),
        "shrunk": ShrinkToBatch(),
        "fused": Fusion(),
    }
    errors: Errors = {}
    silent = {}
    for name, values in priors.items():
        shown = _shown(right, np.full(draws, 4), np.clip(values, -1, 1))
        errors[name] = {}
        for label, baseline in baselines.items():
            found = baseline(shown)
            errors[name][label] = float(((found.view(draws, 4)[:, 0].numpy() - truth) ** 2).mean())
            if name == MIXED:
                still = (shown.rewards - found).view(draws, 4).abs().amax(1) < 1e-9
                silent[label] = float(still.double().mean())
    return errors, silent, _budgets(right, np.clip(priors[MIXED], -1, 1), truth)


MIXED = "four fifths 0.15, one fifth anything"


def _shown(right: np.ndarray, sizes: np.ndarray, prior: np.ndarray) -> Rollouts:
    taken = np.arange(right.shape[1]) < sizes[:, None]
    owner = torch.arange(len(prior)).repeat_interleave(torch.from_numpy(sizes))
    return Rollouts(torch.from_numpy(right[taken]), owner, torch.from_numpy(prior), -1.0, 1.0)


def _budgets(right: np.ndarray, prior: np.ndarray, truth: np.ndarray) -> dict[str, tuple[float, float]]:
    budget, fusion, first = Budget(), Fusion(), np.full(len(prior), 4)

    def distance(sizes: np.ndarray) -> torch.Tensor:
        return fusion.fused(_shown(right, sizes, prior)).distance

    waves = first + budget.second_wave(distance(first), torch.from_numpy(first)).numpy()
    steps = first.copy()
    while (more := budget.wants_more(distance(steps), torch.from_numpy(steps)).numpy()).any():
        steps = steps + more
    found = {}
    for name, sizes in {
        "4 for each": first, "8 for each": first + 4, "16 for each": first + 12,
        "two waves": waves, "one by one": steps,
    }.items():  # fmt: skip
        estimate = fusion.fused(_shown(right, sizes, prior)).baseline.numpy()
        found[name] = float(sizes.mean()), float(((estimate - truth) ** 2).mean())
    return found


def config_of(size: Size, arm: str, config: AlignConfig) -> AlignConfig:
    """An arm's rollouts: as many of a step as of any other, about, in groups of its own."""
    group = 16 if arm == GRPO_16 else 4
    each = 5.5 if arm in (V05, HISTORY, FLIPPED, CONSTANT) else group  # of a budget: what it comes to in simulation
    parts = config.minibatches
    prompts = max(parts, round(size.rollouts / each / parts) * parts)
    steps = round(config.steps * size.rollouts / (prompts * each))
    method: Method = "grpo" if settings_of(arm) is None else "v05"
    return replace(
        config, method=method, prompts=prompts, num_generations=group, steps=steps, save_steps=steps,
        eval_steps=max(1, round(config.eval_steps * steps / config.steps)),
    )  # fmt: skip


def _identity(size: Size, folder: str, arm: str, config: AlignConfig) -> str:
    policy = identity_facts(folder, size.task, size.policy)
    facts = asdict(config_of(size, arm, config)), str(settings_of(arm)), policy, size.held_out
    return f"{arm}/{config.seed}/{scope_of(facts)}"


def _trained(arm: str, config: AlignConfig, size: Size, folder: str) -> dict[str, Any]:
    """One run.

    Returns:
        `seed`, `curve` of held-out problems ([tokens, mean@K, pass@K], in order), `mean` and `best` at its end, `area`
        under mean@K over tokens, `tokens`; means over steps of `silent`, `accepted`, `error`, `rollouts`, `norm` (of
        gradients), and `spread` (its deviation over its mean).
    """
    config = config_of(size, arm, config)
    world = task_world(size.task, config.steps * config.prompts, size.held_out, "correct", config.seed)
    learned = learn(folder, config, world, settings_of(arm))
    mean_of, curve, last = learned.mean_of, np.array(learned.curve), learned.curve[-1]
    tokens, means = curve[:, 0], curve[:, 1]
    norms = np.array([entry["grad_norm"] for entry in learned.steps if entry.get("grad_norm") is not None])
    return {
        "seed": config.seed, "curve": learned.curve, "mean": last[1], "best": last[2], "tokens": last[0],
        "area": float(np.trapezoid(means, tokens) / max(tokens[-1] - tokens[0], 1)),
        "silent": mean_of("prior/silent") if arm not in (GRPO_4, GRPO_16) else mean_of("frac_reward_zero_std"),
        "accepted": mean_of("prior/accepted"), "error": mean_of("prior/error"), "rollouts": mean_of("prior/rollouts"),
        "norm": float(norms.mean()), "spread": float(norms.std() / max(norms.mean(), 1e-12)),
    }  # fmt: skip


def verdicts(run: Run) -> list[tuple[str, str, str]]:
    """Each claim in words, with its source and what it comes to."""
    mixed = run.errors[MIXED]
    found = [
        (
            f"simulation: with a prior that is wild one time in five the fused error ({mixed['fused']:.3f}) is below "
            f"the mean's ({mixed['mean']:.3f}) and the prior's ({mixed['prior']:.3f})",
            PAPER_SOURCE,
            "holds" if mixed["fused"] < min(mixed["mean"], mixed["prior"]) else "does not hold",
        ),
        (
            "simulation: it is, whatever the prior is like",
            OURS,
            "holds" if all(e["fused"] <= min(e["mean"], e["prior"]) for e in run.errors.values()) else "does not hold",
        ),
        (
            f"simulation: fewer prompts teach nothing ({run.silent['fused']:.0%} of them, and with the mean "
            f"{run.silent['mean']:.0%})",
            OURS,
            "holds" if run.silent["fused"] < run.silent["mean"] else "does not hold",
        ),
    ]
    for base in (GRPO_4, GRPO_16, DAPO, SHRUNK):
        if base in run.trained and V05 in run.trained:
            for what, words in (("mean", "mean@K at the end"), ("area", "mean@K over all tokens")):
                gap = run.gap(V05, base, what)
                source = PAPER_SOURCE if base in (GRPO_16, DAPO) else OURS
                sentence = f"Countdown, at as many tokens: {words} is above that of {base}: {signed(gap)}"
                found.append((sentence, source, verdict([-gap], strict=True)))
    for base in (FLIPPED, CONSTANT):
        if base in run.trained and GRPO_4 in run.trained:
            gap = run.gap(base, GRPO_4, "mean")
            sentence = (
                f"Countdown: with a harmful prior ({base}) no more than 0.02 of mean@K is lost to GRPO: {signed(gap)}"
            )
            found.append((sentence, OURS, verdict([-gap], 0.02)))
    return found
