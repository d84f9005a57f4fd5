"""A whole run: resume where there is a checkpoint, train, and leave a model behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.utils import logging

from lissom.errors import UserError
from lissom.files import move_into, writing
from lissom.train.config import Distillation, TrainConfig
from lissom.train.data import TokenWindows
from lissom.train.folder import CHECKPOINTS, STATE, last_checkpoint, step_of
from lissom.train.interrupt import interruptible
from lissom.train.trainer import CausalTrainer

Progress = Callable[[int, int], None]
Say = Callable[[dict[str, float]], None]
_UNFINISHED = "unfinished"  # folder of a model that is being written


def train(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    windows: TokenWindows,
    held_out: TokenWindows | None,
    output: Path,
    teacher: PreTrainedModel | None = None,
    distillation: Distillation | None = None,
    progress: Progress = lambda done, total: None,
    say: Say = lambda entry: None,
) -> list[dict[str, float]]:
    """Train `model` in place, with checkpoints below `output`, and write it to `output`.

    Where there are checkpoints of a run that was stopped it goes on from the last whole one. Ctrl-C ends it behind the
    step that is being made, with a checkpoint; pressed twice, at once.

    Args:
        teacher: see `CausalTrainer`.
        progress: called with (steps done, steps).
        say: called with each entry that is logged.

    Returns:
        What was logged, in order: `step` with `loss` and `learning_rate`, or with `eval_loss` (nats per token).

    Raises:
        UserError: there are fewer windows than a batch, the teacher does not fit, a checkpoint is damaged, the loss or
            weights are no longer finite, or it was interrupted.
    """
    watch = Watch(progress, say)
    trainer = CausalTrainer(
        model, config, output / CHECKPOINTS, windows, held_out, teacher, distillation, callbacks=[watch]
    )
    with without_noise():
        with interruptible(watch, alone=trainer.args.world_size == 1):
            go_on(trainer, watch, last_checkpoint(output), config.steps)
        if trainer.state.global_step < config.steps:
            raise UserError(
                f"Interrupted behind step {trainer.state.global_step}, which is saved: the same command goes on there."
            )
        return _end(trainer, tokenizer, held_out is not None, output)


def go_on(trainer: Trainer, watch: Watch, checkpoint: Path | None, steps: int) -> None:
    """Train from a checkpoint, or from the beginning, to the end.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    try:
        if checkpoint is not None and step_of(checkpoint) >= steps:  # it was stopped behind its last step
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = TrainerState.load_from_json(str(checkpoint / STATE))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except UserError:
        raise
    except Exception as error:
        if checkpoint is None or watch.begun:
            raise
        raise UserError(
            f"{checkpoint} cannot be read ({type(error).__name__}): delete it, and the run goes on from the one before."
        ) from error


def leave(trainer: Trainer, tokenizer: PreTrainedTokenizerBase | None, output: Path) -> None:
    """Write the model, whole or not at all, and nothing that nobody needs."""
    if trainer.is_fsdp_enabled:  # by itself accelerate would write shards
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    unfinished = output / _UNFINISHED
    with writing(output):
        trainer.save_model(str(unfinished))
        if trainer.is_world_process_zero():
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
            for other in ("training_args.bin", "README.md"):  # a pickle, and a card that knows nothing of us
                (unfinished / other).unlink(missing_ok=True)
            move_into(output, unfinished, last="config.json")  # without which there is no model


def _end(
    trainer: CausalTrainer, tokenizer: PreTrainedTokenizerBase | None, measures: bool, output: Path
) -> list[dict[str, float]]:
    trainer.require_finite()
    measured = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if measures and trainer.config.steps not in measured:
        trainer.evaluate()
    leave(trainer, tokenizer, output)
    return [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]


@contextmanager
def without_noise() -> Iterator[None]:
    """Without transformers' bars for each file that is written, which would fall into the caller's.

    And without its doubts about the file system where two checkpoints are written within a second.
    """
    shown = logging.is_progress_bar_enabled()
    logger = logging.get_logger("transformers.trainer_utils")
    logging.disable_progress_bar()
    logger.addFilter(_not_about_times)
    try:
        yield
    finally:
        logger.removeFilter(_not_about_times)
        if shown:
            logging.enable_progress_bar()


def _not_about_times(record: LogRecord) -> bool:
    return not record.getMessage().startswith("mtime may not be reliable")


class Watch(TrainerCallback):
    """Tells of steps and of the log, and ends the training behind a step where `stopped` is set."""

    def __init__(self, progress: Progress, say: Say) -> None:
        self.progress, self.say = progress, say
        self.begun = self.stopped = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and state.is_world_process_zero and "train_runtime" not in logs:
            self.say({"step": state.global_step, **logs})
