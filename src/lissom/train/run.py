"""A whole run: resume where there is a checkpoint, train, and leave a model behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from lissom.models.method import Training
from lissom.train.config import Distillation, TrainConfig
from lissom.train.data import TokenWindows
from lissom.train.trainer import CausalTrainer, arguments_of

Progress = Callable[[int, int], None]
Say = Callable[[dict[str, float]], None]
CHECKPOINTS = "checkpoints"


def train(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: TokenWindows,
    held_out: TokenWindows | None,
    output: Path,
    trainings: Sequence[Training] = (),
    teacher: PreTrainedModel | None = None,
    distillation: Distillation | None = None,
    progress: Progress = lambda done, total: None,
    say: Say = lambda entry: None,
) -> list[dict[str, float]]:
    """Train `model` in place, with checkpoints below `output`, and write it to `output`.

    Where there are checkpoints of a run that was stopped it goes on from the last whole one.

    Args:
        trainings: of methods that were put into the model.
        teacher: see `CausalTrainer`.
        progress: called with (steps done, steps).
        say: called with each entry that is logged.

    Returns:
        What was logged, in order: `step` with `loss` and `learning_rate`, or with `eval_loss` (nats per token).
    """
    folder = output / CHECKPOINTS
    arguments = arguments_of(config, str(folder), held_out is not None)
    trainer = CausalTrainer(
        model, config, arguments, windows, held_out, trainings, teacher, distillation, [_Watch(progress, say)]
    )
    with _no_other_bars():
        return _run(trainer, config, tokenizer, held_out is not None, output)


def _run(
    trainer: CausalTrainer, config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None, measures: bool, output: Path
) -> list[dict[str, float]]:
    trainer.train(resume_from_checkpoint=last_checkpoint(output / CHECKPOINTS))
    measured = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if measures and config.steps not in measured:
        trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    if tokenizer is not None and trainer.is_world_process_zero():
        tokenizer.save_pretrained(output)
    if trainer.is_fsdp_enabled:  # by itself accelerate would write shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output))
    if trainer.is_world_process_zero():
        (output / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody needs
    return history


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end: its state is what is written last."""
    while folder.is_dir() and (found := get_last_checkpoint(str(folder))) is not None:
        if (Path(found) / "trainer_state.json").exists():
            return found
        os.rename(found, f"{found.replace('checkpoint-', 'damaged-')}")
    return None


@contextmanager
def _no_other_bars() -> Iterator[None]:
    """Without transformers' bars for each file that is written: they would fall into the caller's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Watch(TrainerCallback):
    def __init__(self, progress: Progress, say: Say) -> None:
        self.progress, self.say = progress, say

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            self.say({"step": state.global_step, **logs})
