"""Whether nonlinear branches make training shorter, and by what: seven arms from scratch, paired.

The paper's claim is that a model with CosNet branches needs fewer steps for the loss that the plain one ends with. Here
both are trained from scratch, and so is all that could explain it otherwise: an initial scale half as large, biases (a
new branch gives next to nothing but a constant), a linear branch and one of GELUs of the same rank and learning rates,
and a model that is wider by as many parameters and operations. All arms of a seed see the same windows in the same
order and begin with the same random numbers; learning rates are tuned for the plain model and for CosNet apart.

Steps to the target are counted where the learning rate is constant, so that both losses are of models that are still
being trained; the short decay behind it is the same for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.arms import train_missing
from lissom.evals.journal import Journal, scope
from lissom.evals.stats import Interval, geometric_interval, mean_interval, ratio_interval, verdict
from lissom.evals.targets import smoothed, speedup
from lissom.evals.training_steps import kept_bytes, loss_of, operations, rounds_of, step
from lissom.models import assets
from lissom.train import TokenWindows, TrainConfig, new_model, new_tokenizer, token_windows, train
from lissom.weights.noble import NobleConfig, noble_parameter_groups
from lissom.weights.noble.apply import layers_of

STAGES = ("tuning", "training", "timing")
TEXT = "sotu"
PLAIN, HALF, BIASED, WIDER = "baseline", "half init", "biases", "wider"
LINEAR, GELU, COSNET = "linear branch", "GELU branch", "CosNet"
CENTRED, REPO = "CosNet, centred", "CosNet, repo preset"
MAIN = (PLAIN, HALF, BIASED, LINEAR, GELU, COSNET, WIDER)  # the arms of the comparison
ARMS = (*MAIN, CENTRED, REPO)
_BRANCHES: Mapping[str, dict[str, Any]] = {
    LINEAR: {"activation": "identity"},
    GELU: {"activation": "gelu-net"},
    COSNET: {},
    CENTRED: {"centred": True},
    REPO: {"preset": "repo"},
}
EAGER = "CosNet, operation by operation"


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        arms: of `ARMS`.
        seeds: of random weights and of the order of windows: the units of all intervals.
        config: of the training; its seed and learning rates are the arm's.
        rates: learning rates that are tried, for the plain model and for CosNet, on another seed.
        tuning_steps: of each of those runs.
        rank: of the branches.
        model: keywords of `new_model`.
        vocabulary: of the tokenizer, which is learned from the text.
        held_out: every how manieth window is measured on instead of trained on.
        rounds: of the timing.
    """

    arms: Sequence[str]
    seeds: Sequence[int]
    config: TrainConfig
    rates: Sequence[float]
    tuning_steps: int
    rank: int
    model: Mapping[str, Any] = field(default_factory=lambda: {"hidden": 128, "layers": 4, "heads": 4})
    vocabulary: int = 1024
    held_out: int = 100
    rounds: int = 15


def _config(steps: int, every: int, context: int = 128, batch_size: int = 16) -> TrainConfig:
    return TrainConfig(
        steps=steps, context=context, batch_size=batch_size, warmup_steps=max(1, steps // 20), schedule="wsd",
        decay_share=0.2, logging_steps=every, eval_steps=every, save_steps=steps,
    )  # fmt: skip


_SMALL_MODEL = {"hidden": 64, "layers": 3, "heads": 2}
QUICK = Size(
    MAIN, (0, 1), _config(6, 2, 32, 2), (8e-3, 4e-3), 2, 2, {"hidden": 48, "layers": 1, "heads": 3}, 300, 4000, rounds=2
)
SMALL = Size(MAIN, (0, 1, 2), _config(600, 30), (4e-3, 8e-3, 1.6e-2), 200, 4, _SMALL_MODEL, 512)
DEFAULT = Size(ARMS, (0, 1, 2), _config(1200, 40), (1e-3, 2e-3, 4e-3, 8e-3), 500, 8)
# 250 M parameters at a context of 1024, ranks of the paper. Its text is not at hand: the same one, many times over.
PAPER = Size(
    ARMS, (0, 1, 2), _config(20_000, 500, 1024, 64), (1e-4, 3e-4, 1e-3), 4000, 64,
    {"hidden": 1024, "layers": 16, "heads": 16, "kv_heads": 16}, 32_768,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a check measured.

    Attributes:
        rates: the tuned learning rate, by `PLAIN` and `COSNET`, and `tuning`: held-out NLL by arm and rate.
        trained: by arm, one record per seed: `held_out` ([step, nats per token], in order), `seed`.
        parameters: of each arm.
        seconds: of a training step by arm, one number per round.
        kept: bytes that the forward pass keeps for the gradients, by arm.
        operations: of a training step's matrix products, by arm.
    """

    size: Size
    rates: dict[str, Any]
    trained: dict[str, list[dict[str, Any]]]
    parameters: dict[str, int]
    seconds: dict[str, list[float]]
    kept: dict[str, int]
    operations: dict[str, float]

    def final(self, arm: str) -> np.ndarray:
        """Nats per token of held-out text at the end, one number per seed."""
        return np.array([record["held_out"][-1][1] for record in self.trained[arm]])

    def above(self, arm: str, base: str) -> Interval:
        """Final NLL of an arm minus that of another, paired by seed."""
        return mean_interval(self.final(arm) - self.final(base))

    def speedups(self, arm: str, base: str = PLAIN) -> np.ndarray:
        """By how many times fewer steps the arm comes to the loss that `base` has where its rate begins to fall; below
        1 where it needs more. One number per seed."""
        end = constant_until(self.size.config)
        found = []
        for ours, theirs in zip(self.trained[arm], self.trained[base], strict=True):
            found.append(speedup(smoothed(ours["held_out"], end), smoothed(theirs["held_out"], end)))
        return np.array(found)

    def speedup(self, arm: str, base: str = PLAIN) -> Interval:
        """The geometric mean over seeds, with its interval."""
        return geometric_interval(self.speedups(arm, base))

    def step_time(self, arm: str, base: str = PLAIN) -> Interval:
        """Time of a step over that of another arm's, of the same rounds."""
        return ratio_interval(self.seconds[arm], self.seconds[base])

    def net(self, arm: str) -> Interval:
        """By how many times less time it comes to the baseline's loss: fewer steps over longer steps, the interval that
        of the steps."""
        steps, time = self.speedup(arm), self.step_time(arm).estimate
        return Interval(steps.estimate / time, steps.low / time, steps.high / time)


def constant_until(config: TrainConfig) -> int:
    """The last step before the learning rate falls."""
    return round(config.steps * (1 - config.decay_share))


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Run:
    """The whole check; a run that was stopped goes on behind the last arm and seed in `journal`.

    Args:
        model: whatever measurements shall be known by; the arms are new models.
    """
    return measure(model, size, *texts(size), journal, progress)


def measure(
    model: PreTrainedModel,
    size: Size,
    windows: TokenWindows,
    held_out: TokenWindows,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Run:
    """The same on any text."""
    known = Journal(journal)
    rates = tune(model, size, windows, held_out, known, partial(progress, STAGES[0]))
    jobs, plan = {}, {}
    for seed in size.seeds:
        for arm in size.arms:
            config = config_of(size, seed, rates[COSNET if arm in _BRANCHES else PLAIN])
            identity = _identity(model, size, arm, config)
            jobs[identity], plan[identity] = (arm, config, size, windows, held_out), arm
    train_missing(jobs, _trained, known, partial(progress, STAGES[1]))
    trained = {arm: [known[identity] for identity, own in plan.items() if own == arm] for arm in size.arms}
    costs = time_steps(model, size, known, partial(progress, STAGES[2]))
    return Run(size, rates, trained, costs["parameters"], costs["seconds"], costs["kept"], costs["operations"])


def texts(size: Size) -> tuple[TokenWindows, TokenWindows]:
    """Windows to train on, each once, and windows from all over the same text to measure on.

    Raises:
        ValueError: some would be seen twice.
    """
    path = assets.path(TEXT)
    tokenizer = new_tokenizer((text for _, text in assets.corpus(TEXT)), size.vocabulary)
    context, batch = size.config.context, size.config.batch_size
    windows, held_out = apart(token_windows(path, tokenizer, context), size.held_out, batch)
    if size is not PAPER and size.config.steps * batch > len(windows):
        raise ValueError("The text is too short for so many steps: windows would be seen twice.")
    return windows, held_out


def apart(windows: TokenWindows, every: int, batch: int) -> tuple[TokenWindows, TokenWindows]:
    """`windows` without each `every`th one, and those, as many as fill batches."""
    context = windows.context
    rows = np.asarray(windows.tokens[: len(windows) * context]).reshape(-1, context)
    held = np.arange(len(rows)) % every == every - 1
    count = max(1, int(held.sum()) // batch) * batch
    return TokenWindows(rows[~held].ravel(), context), TokenWindows(rows[held].ravel(), context, 0, count)


def _identity(model: PreTrainedModel, size: Size, arm: str, config: TrainConfig) -> str:
    shape = size.vocabulary, sorted(size.model.items()), size.held_out, size.rank
    settings = [sorted(_BRANCHES[arm].items())] if _BRANCHES.get(arm) else []
    return f"{arm}/{config.seed}/{scope(model, shape, asdict(config), *settings)}"


def config_of(size: Size, seed: int, rate: float, steps: int | None = None) -> TrainConfig:
    """Of one training."""
    changes: dict[str, Any] = {"seed": seed, "learning_rate": rate, "min_learning_rate": rate / 30}
    if steps is not None:
        changes |= {"steps": steps, "warmup_steps": max(1, steps // 20), "eval_steps": steps, "save_steps": steps}
        changes |= {"logging_steps": steps}
    return TrainConfig(**asdict(size.config) | changes)


def tune(
    model: PreTrainedModel,
    size: Size,
    windows: TokenWindows,
    held_out: TokenWindows,
    known: Journal,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """The best of the learning rates for the plain model and for CosNet, in short runs on a seed of their own."""
    seed, jobs, plan = max(size.seeds) + 1000, {}, {}
    for rate in size.rates:
        for arm in (PLAIN, COSNET):
            config = config_of(size, seed, rate, size.tuning_steps)
            identity = f"tuning/{_identity(model, size, arm, config)}"
            jobs[identity], plan[identity] = (arm, config, size, windows, held_out), (arm, rate)
    train_missing(jobs, _trained, known, progress)
    found: dict[str, Any] = {"tuning": {PLAIN: {}, COSNET: {}}}
    for identity, (arm, rate) in plan.items():
        found["tuning"][arm][rate] = known[identity]["held_out"][-1][1]
    for arm, losses in found["tuning"].items():
        found[arm] = min(losses, key=losses.get)
    return found


def build(arm: str, size: Size, seed: int) -> PreTrainedModel:
    """The model of an arm, with random weights: those of the baseline wherever they have the same shape."""
    model = plain = new_model(size.vocabulary, **size.model, context=size.config.context, seed=seed)
    if arm in (BIASED, WIDER):
        changes = {"biases": True} if arm == BIASED else {"intermediate": wider(size)}
        model = new_model(size.vocabulary, **dict(size.model) | changes, context=size.config.context, seed=seed)
        own = model.state_dict()
        same = {name: value for name, value in plain.state_dict().items() if own[name].shape == value.shape}
        model.load_state_dict(same, strict=False)
    if arm in _BRANCHES:
        NobleConfig(rank=size.rank, seed=seed, **_BRANCHES[arm]).convert(model)
    if arm == HALF:
        branched = build(COSNET, size, seed).state_dict()
        model.load_state_dict({name: branched[name] for name in model.state_dict()})
    return model


def wider(size: Size) -> int:
    """Width of the MLP that has as many parameters more as CosNet's branches, to the nearest one."""
    plain, branched = (build(arm, size, 0) for arm in (PLAIN, COSNET))
    added = sum(p.numel() for p in branched.parameters()) - sum(p.numel() for p in plain.parameters())
    config = plain.config
    return config.intermediate_size + round(added / (3 * config.hidden_size * config.num_hidden_layers))


def _trained(
    arm: str, config: TrainConfig, size: Size, windows: TokenWindows, held_out: TokenWindows
) -> dict[str, Any]:
    model = build(arm, size, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        history = train(config, model, None, windows, held_out, Path(folder))
    measured = [[entry["step"], entry["eval_loss"]] for entry in history if "eval_loss" in entry]
    return {"arm": arm, "seed": config.seed, "held_out": measured, "history": history}


def time_steps(
    model: PreTrainedModel, size: Size, known: Journal, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """See `timed`."""
    shape = size.vocabulary, sorted(size.model.items()), size.rank, asdict(size.config), size.rounds, tuple(size.arms)
    identity = f"timing/{scope(model, shape)}"
    if identity not in known:
        known.add(identity, timed(size, progress))
    progress(size.rounds, size.rounds)
    return known[identity]


def timed(size: Size, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Seconds of a training step of each arm, where and in what precision arms are trained; what the forward pass keeps
    for the gradients; parameters; and operations of a step."""
    bf16 = size.config.precision == "bf16"
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    ids = torch.randint(size.vocabulary, (size.config.batch_size, size.config.context), device=device)
    models = {arm: _timed_model(arm, size).to(device) for arm in _timed_arms(size)}
    optimizers = {
        arm: torch.optim.AdamW(noble_parameter_groups(own, 1e-4, 0.1), fused=True) for arm, own in models.items()
    }
    works = {arm: partial(step, own, optimizers[arm], ids, bf16) for arm, own in models.items()}
    return {
        "seconds": rounds_of(works, size.rounds, progress),
        "parameters": {arm: sum(p.numel() for p in own.parameters()) for arm, own in models.items()},
        "kept": {arm: kept_bytes(own, partial(loss_of, own, ids, bf16)) for arm, own in models.items()},
        "operations": {arm: operations(own) * ids.numel() for arm, own in models.items()},
    }


def _timed_arms(size: Size) -> tuple[str, ...]:
    return (*size.arms, EAGER) if COSNET in size.arms else tuple(size.arms)


def _timed_model(arm: str, size: Size) -> PreTrainedModel:
    model = build(COSNET if arm == EAGER else arm, size, 0)
    if arm == EAGER:
        for layer in layers_of(model).values():
            layer.fused = False
    return model


def verdicts(run: Run) -> list[tuple[str, str]]:
    """What the paper claims, in words, and what it comes to here."""
    found = []
    words = {
        PLAIN: "CosNet ends at a lower loss than the tuned baseline",
        HALF: "CosNet ends at a lower loss than half as large initial weights do",
        BIASED: "CosNet ends at a lower loss than biases do",
        LINEAR: "CosNet ends at a lower loss than a linear branch of its rank",
        GELU: "CosNet ends at a lower loss than a branch of GELUs of its rank",
        WIDER: "CosNet ends at a lower loss than a model wider by as many parameters and operations",
    }
    for arm, claim in words.items():
        if {arm, COSNET} <= set(run.trained):
            found.append((claim, verdict([run.above(COSNET, arm)], strict=True)))
    steps, net = run.speedup(COSNET), run.net(COSNET)
    for claim, interval, least in (
        ("CosNet needs at least 1.10 times fewer steps to the baseline's loss", steps, 1.10),
        ("CosNet needs less time to the baseline's loss", net, 1.0),
    ):
        below = Interval(least - interval.estimate, least - interval.high, least - interval.low)
        found.append((f"{claim}: {interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]", verdict([below])))
    return found
