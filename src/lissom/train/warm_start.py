"""A small policy that knows the format of a task and little more: what learning from reward begins with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.files import atomic_path
from lissom.models.method import check_types
from lissom.rl.tasks import NumberTask
from lissom.rl.tasks.characters import character_tokenizer
from lissom.train.config import TrainConfig
from lissom.train.data import token_windows
from lissom.train.run import train
from lissom.train.scratch import new_model

_CONTEXT = 256  # tokens that the model can read
_SHORTEST = 8  # tokens of prompt and trace
_TRACES = "traces.jsonl"
_TRAINING = TrainConfig(steps=800, batch_size=16, context=128, learning_rate=2e-3, warmup_steps=50, weight_decay=0.01)


@dataclass(frozen=True)
class WarmStart:
    """Sizes of the policy and of its training.

    Attributes:
        hidden, layers, heads: of a Llama-like model over characters.
        traces: of the task, right and wrong, that it is trained on, at most.
        config: of the training.
    """

    hidden: int = 96
    layers: int = 4
    heads: int = 4
    traces: int = 60_000
    config: TrainConfig = _TRAINING

    def __post_init__(self) -> None:
        check_types(self)
        if self.traces < 1000:
            raise UserError(f"traces={self.traces}: expected at least 1000.")

    @property
    def seen(self) -> int:
        """Traces that the training comes to: no more are written."""
        tokens = self.config.steps * self.config.batch_size * self.config.context
        return max(1000, min(self.traces, tokens // _SHORTEST))


def write_traces(task: NumberTask, count: int, file: Path, seed: int = 0) -> None:
    """`count` lines of prompt and trace, problems of `train` only, as text to train on."""
    random = np.random.default_rng([seed, 7])
    with atomic_path(file) as temporary, temporary.open("w") as out:
        for problem in task.problems("train", count, seed):
            prompt = task.prompt(problem)
            if not isinstance(prompt, str):
                raise UserError(f"A small policy learns {task.name} in steps, not in a chat.")
            out.write(json.dumps({"text": prompt + task.trace(problem, random)}) + "\n")


def warm_start(
    task: NumberTask,
    output: Path,
    settings: WarmStart | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Train a policy on traces of `task`, as `lissom train` does, and write it to `output`; a run that was stopped goes
    on.

    Args:
        task: in steps. Its share of right traces decides how often the policy will be right.
        progress: called with (steps done, steps).
    """
    settings = settings or WarmStart()
    tokenizer = character_tokenizer()
    seed = settings.config.seed
    traces = output / _TRACES
    write_traces(task, settings.seen, traces, seed)
    model = new_model(
        len(tokenizer), settings.hidden, settings.layers, settings.heads, settings.heads, context=_CONTEXT, tied=True,
        seed=seed,
    )  # fmt: skip
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = (
            None,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
    windows, held_out = token_windows(traces, tokenizer, settings.config.context).split(0.02)
    train(settings.config, model, tokenizer, windows, held_out, output, progress=progress)
    return model, tokenizer


def facts_of(task: NumberTask, settings: WarmStart) -> dict[str, object]:
    """What a policy depends on, for records of runs."""
    return {"task": {"name": task.name, **asdict(task)}, "warm start": asdict(settings)}  # type: ignore[call-overload]
