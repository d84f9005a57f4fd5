"""What 2:4 sparsity costs a ternary model, and what it costs a floating point one: trained from scratch, paired.

The paper's claim is relative: a mask raises the perplexity of a ternary model by a smaller share than that of a
floating point model. Here both are trained with masks and without, from the same random weights and on the same windows
in the same order, for several seeds; and so is every ablation of the method. Then the given model is made ternary, with
itself as the teacher, for as long as an hour allows.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.arms import train_missing
from lissom.evals.journal import Journal, scope
from lissom.evals.perplexity import window_nll
from lissom.evals.stats import Interval, geometric_interval, mean_interval, paired_bootstrap, verdict
from lissom.models import assets
from lissom.train import TokenWindows, TrainConfig, new_model, new_tokenizer, token_windows, train
from lissom.weights.sparse_bitnet import SparseBitNetConfig

STAGES = ("training", "conversion")
TEXT = "sotu"
FLOAT, FLOAT_SPARSE, TERNARY, SPARSE = "float dense", "float 2:4", "ternary dense", "ternary 2:4"
MASK, GRADIENT, MASKED_SCALE, SURVIVORS = (
    "mask from ternary", "masked gradient", "scale with masked zeros", "scale of survivors",
)  # fmt: skip
SHARES = {0.25: "sparse in the last 25 %", 0.5: "sparse in the last 50 %", 0.75: "sparse in the last 75 %"}
ARMS: dict[str, SparseBitNetConfig | None] = {
    FLOAT: None,
    FLOAT_SPARSE: SparseBitNetConfig(quantize=False),
    TERNARY: SparseBitNetConfig(n=4),
    SPARSE: SparseBitNetConfig(),
    MASK: SparseBitNetConfig(mask_from="ternary"),
    GRADIENT: SparseBitNetConfig(gradient="masked"),
    MASKED_SCALE: SparseBitNetConfig(scale_from="masked"),
    SURVIVORS: SparseBitNetConfig(scale_from="survivors"),
    **{name: SparseBitNetConfig(sparse_share=share) for share, name in SHARES.items()},
}
MAIN = (FLOAT, FLOAT_SPARSE, TERNARY, SPARSE)
BEFORE, ONE_SHOT, AFTER = "before", "one-shot, not the method", "after"


@dataclass(frozen=True)
class Conversion:
    """How the given model is made ternary.

    Attributes:
        settings: of the method.
        config: of the training; the teacher is the model itself.
        windows: of held-out text that are measured.
    """

    settings: SparseBitNetConfig
    config: TrainConfig
    windows: int = 64


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        arms: of `ARMS`.
        seeds: of the random weights and of the order of the windows: the units of all intervals.
        more_seeds: after those, of the main arms alone.
        config: of the training; its seed and learning rate are the arm's.
        rates: learning rates of floating point and of ternary models, tuned once on the dense arms.
        model: keywords of `new_model`.
        vocabulary: of the tokenizer, which is learned from the text.
        held_out: share of the text: its end.
        one_pass: whether no window is seen twice, so that the loss of a step is that of text which is new to the model.
            What is compared is then the mean over the last log line, four times as much text as is held out, and of the
            same kind; the end of the text may be of another (the newest speeches).
        conversion: None leaves it out.
    """

    arms: Sequence[str]
    seeds: Sequence[int]
    config: TrainConfig
    rates: Mapping[str, float] = field(default_factory=lambda: {"float": 8e-3, "ternary": 8e-3})
    model: Mapping[str, Any] = field(default_factory=lambda: {"hidden": 64, "layers": 3, "heads": 2})
    vocabulary: int = 512
    held_out: float = 0.01
    one_pass: bool = True
    conversion: Conversion | None = None
    more_seeds: Sequence[int] = ()


def _config(steps: int, context: int = 128, batch_size: int = 16) -> TrainConfig:
    part = max(1, steps // 20)
    return TrainConfig(
        steps=steps, context=context, batch_size=batch_size, warmup_steps=part, logging_steps=part, eval_steps=steps,
        save_steps=steps,
    )  # fmt: skip


def _conversion(steps: int) -> Conversion:
    """By itself as the teacher, with short windows: steps matter more than tokens."""
    config = TrainConfig(
        steps=steps, context=128, batch_size=4, learning_rate=1e-3, min_learning_rate=3e-5, warmup_steps=steps // 20,
        weight_decay=0.0, precision="bf16", logging_steps=max(1, steps // 20), eval_steps=steps, save_steps=25,
    )  # fmt: skip
    return Conversion(SparseBitNetConfig(), config)


QUICK = Size(MAIN, (0, 1), _config(4, 32, 2), model={"hidden": 48, "layers": 1, "heads": 3}, vocabulary=300)
SMALL = Size(MAIN, (0, 1, 2), _config(600), conversion=_conversion(40))
DEFAULT = Size(tuple(ARMS), (0, 1, 2), _config(2000), conversion=_conversion(500), more_seeds=(3, 4))
# The paper's smallest model and its recipe. Its 50 billion tokens are not at hand: the same text, many times over.
PAPER = Size(
    tuple(ARMS), (0, 1, 2), _config(10_000, 2048, 64), rates={"float": 3e-4, "ternary": 3e-4}, vocabulary=32_768,
    model={"hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate": 4864}, one_pass=False,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a check measured.

    Attributes:
        trained: by arm, one record per seed: `nll` (nats per token of held-out text) and `history` (`step`, `loss`,
            which is the mean since the line before, and what `SparseTraining` measures).
        converted: nats per token, one number per held-out window, by `BEFORE`, `ONE_SHOT` and `AFTER`; and `history`.
    """

    size: Size
    trained: dict[str, list[dict[str, Any]]]
    converted: dict[str, Any]

    def nll(self, arm: str) -> np.ndarray:
        """Nats per token of new text, see `Size.one_pass`, one number per seed."""
        if self.size.one_pass:
            return np.array([record["history"][-1]["loss"] for record in self.trained[arm]])
        return self.held_out(arm)

    def held_out(self, arm: str) -> np.ndarray:
        """Nats per token of the end of the text, one number per seed."""
        return np.array([record["nll"] for record in self.trained[arm]])

    def increase(self, sparse: str, dense: str) -> np.ndarray:
        """By what share the mask raises the perplexity, one number per seed."""
        return np.exp(self.nll(sparse) - self.nll(dense)) - 1

    def above(self, arm: str, base: str = SPARSE) -> Interval:
        """NLL of an arm minus that of another, paired by seed, over those that both have."""
        ours, others = self.nll(arm), self.nll(base)
        pairs = min(len(ours), len(others))
        return mean_interval(ours[:pairs] - others[:pairs])

    @property
    def ratio(self) -> Interval | None:
        """Increase of the floating point model over that of the ternary one (geometric mean over seeds); None where one
        of them is no increase."""
        increases = self.increase(FLOAT_SPARSE, FLOAT), self.increase(SPARSE, TERNARY)
        if min(values.min() for values in increases) <= 0:
            return None
        return geometric_interval(increases[0] / increases[1])

    def measured(self, arm: str, what: str) -> list[tuple[int, float]]:
        """(step, mean over seeds) of what is logged while an arm is trained."""
        histories = [record["history"] for record in self.trained[arm]]
        steps = [entry["step"] for entry in histories[0] if what in entry]
        values = [[entry[what] for entry in history if what in entry] for history in histories]
        return list(zip(steps, np.mean(values, 0).tolist(), strict=True))

    def conversion_above(self, one: str, other: str) -> Interval:
        """NLL of one state of the converted model minus that of another, paired by window."""
        return paired_bootstrap(np.array(self.converted[one]), np.array(self.converted[other]))


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Run:
    """The whole check; a run that was stopped goes on behind the last arm and seed in `journal`, and the conversion at
    its last checkpoint, which lies beside it.

    Args:
        model: fp32 with dense weights, which is converted; it stays as it is.
        progress: called with (stage, done, total); the stages are `STAGES`.

    Raises:
        UserError: the model cannot be converted, or there is too little text.
    """
    known = Journal(journal)
    trained = train_arms(model, size, known, partial(progress, STAGES[0]))
    converted = {}
    if size.conversion is not None:
        converted = convert(model, tokenizer, size.conversion, size.held_out, known, partial(progress, STAGES[1]))
    return Run(size, trained, converted)


def train_arms(
    model: PreTrainedModel, size: Size, known: Journal, progress: Callable[[int, int], None]
) -> dict[str, list[dict[str, Any]]]:
    """Every arm and seed, as many at a time as there are threads; one seed after the other, for the sake of whole pairs
    where a run is cut short.

    Args:
        model: whatever `scope` shall know measurements by; the arms are new models.
    """
    text = assets.path(TEXT)
    tokenizer = new_tokenizer((text for _, text in assets.corpus(TEXT)), size.vocabulary)
    windows, held_out = token_windows(text, tokenizer, size.config.context).split(size.held_out)
    batch = size.config.batch_size
    if size.one_pass and size.config.steps * size.config.gradient_accumulation_steps * batch > len(windows):
        raise ValueError("The text is too short for so many steps: windows would be seen twice.")
    held_out = TokenWindows(held_out.tokens, held_out.context, held_out.first, max(1, len(held_out) // batch * batch))
    shape = size.vocabulary, sorted(size.model.items()), size.held_out
    plan = {
        f"{arm}/{seed}/{scope(model, shape, asdict(config_of(arm, seed, size)), ARMS[arm])}": (arm, seed)
        for seed in (*size.seeds, *size.more_seeds)
        for arm in size.arms
        if seed in size.seeds or arm in MAIN
    }
    jobs = {
        identity: (arm, config_of(arm, seed, size), size, len(tokenizer), windows, held_out)
        for identity, (arm, seed) in plan.items()
    }
    train_missing(jobs, _trained, known, progress)
    return {arm: [known[identity] for identity, (own, _) in plan.items() if own == arm] for arm in size.arms}


def config_of(arm: str, seed: int, size: Size) -> TrainConfig:
    """The paper's recipe: weight decay of ternary models falls to nothing in half of the training."""
    settings = ARMS[arm]
    ternary = settings is not None and settings.quantize
    rate = size.rates["ternary" if ternary else "float"]
    return TrainConfig(
        **asdict(size.config)
        | {
            "seed": seed,
            "learning_rate": rate,
            "min_learning_rate": rate / 30,
            "weight_decay_until": 0.5 if ternary else None,
        }
    )


def _trained(
    arm: str, config: TrainConfig, size: Size, vocabulary: int, windows: TokenWindows, held_out: TokenWindows
) -> dict[str, Any]:
    model = new_model(vocabulary, **size.model, context=config.context, seed=config.seed)
    settings = ARMS[arm]
    if settings is not None:
        settings.convert(model)
    with tempfile.TemporaryDirectory() as folder:
        history = train(config, model, None, windows, held_out, Path(folder))
    logged = [entry for entry in history if "loss" in entry]
    return {"arm": arm, "seed": config.seed, "nll": history[-1]["eval_loss"], "history": logged}


def convert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversion: Conversion,
    held_out: float,
    known: Journal,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """The model's NLL as it is, with its weights rounded and nothing else done, and after training."""
    windows, held = token_windows(assets.path(TEXT), tokenizer, conversion.config.context).split(held_out)
    measured = [held[i]["input_ids"] for i in range(min(conversion.windows, len(held)))]
    identity = f"conversion/{scope(model, asdict(conversion.config), conversion.settings, len(measured), held_out)}"
    if identity not in known:
        student = conversion.settings.convert(copy.deepcopy(model))
        found: dict[str, Any] = {BEFORE: window_losses(model, measured), ONE_SHOT: window_losses(student, measured)}
        folder = known.path.parent / identity.replace("/", "-")
        found["history"] = train(
            conversion.config, student, None, windows, None, folder, model, progress=progress,
        )  # fmt: skip
        found[AFTER] = window_losses(student.eval(), measured)
        known.add(identity, found)
    progress(conversion.config.steps, conversion.config.steps)
    return known[identity]


def window_losses(model: PreTrainedModel, windows: Sequence[torch.Tensor]) -> list[float]:
    """Nats per token of each window."""
    return [float(window_nll(model, ids, len(ids), len(ids) - 1).mean()) for ids in windows]


def verdicts(run: Run) -> list[tuple[str, str]]:
    """What the paper claims, in words, and what it comes to here."""
    found = []
    if set(MAIN) <= set(run.trained):
        more = run.increase(SPARSE, TERNARY) - run.increase(FLOAT_SPARSE, FLOAT)
        words = "2:4 raises the perplexity of ternary models by a smaller share than that of floating point models"
        ratio = run.ratio
        if ratio is not None:
            words += f": {ratio.estimate:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times smaller"
        found.append((words, verdict([mean_interval(more)], strict=True)))
    worse = {
        MASK: "masks from the master weights are better than from the ternary ones",
        GRADIENT: "the gradient of all weights is at least as good as that of those that are left",
        MASKED_SCALE: "the scale of all weights is better than one with the masked as zeros",
        SURVIVORS: "the scale of all weights is better than that of the survivors",
    }
    for arm, words in worse.items():
        if {arm, SPARSE} <= set(run.trained):
            found.append((words, verdict([run.above(SPARSE, arm)], strict=arm != GRADIENT)))
    order = [name for name in (*SHARES.values(), SPARSE) if name in run.trained]
    if len(order) > 1:
        steps = [run.above(after, before) for before, after in pairwise(order)]
        found.append(("the larger the share of the steps with masks, the better", verdict(steps)))
    if TERNARY in run.trained:
        first, last = (np.array([record["history"][i]["zeros"] for record in run.trained[TERNARY]]) for i in (0, -1))
        words = f"zeros of dense ternary models become more: {first.mean():.1%} to {last.mean():.1%}"
        found.append((words, verdict([mean_interval(first - last)], strict=True)))
    return found
