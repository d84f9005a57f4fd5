"""Trains the editing model: accelerate, an average of the weights, and checkpoints from which a run goes on exactly."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lissom.devices.machine import fast_bf16
from lissom.diffusion.demo import Batch, Emoji, draw
from lissom.diffusion.demo.model import EditModel, Shape, prepared
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.diffusion.demo.sheet import sheet
from lissom.diffusion.demo.task import TASKS, Kind, training_batch
from lissom.diffusion.pictures import write_picture
from lissom.errors import UserError
from lissom.files import atomic_path, move_into, writing
from lissom.train.config import Schedule
from lissom.train.folder import CHECKPOINTS, STATE, last_checkpoint, step_of
from lissom.train.interrupt import interruptible
from lissom.train.schedule import learning_rate

Progress = Callable[[int, int], None]
Say = Callable[[dict[str, float]], None]
_KEPT = 2  # checkpoints
_UNFINISHED, _TENSORS = "unfinished", "state.safetensors"


@dataclass(frozen=True)
class DitConfig(Schedule):
    """A training run of the editing model.

    Attributes:
        ema_decay: share of the average of the weights that a step leaves, at most; it grows from 0 with the steps.
        prompt_dropout: share of the prompts that are left empty, which guidance needs.
        task: `all` kinds of requests, or what a short training learns: `words`, pictures from words and edits by a
            word, or only edits `by-word`.
        precision: of products: `fp32`, `bf16`, or `auto`: the one that this machine multiplies faster. Weights and the
            optimiser are fp32.
        sample_steps: steps between sheets of pictures.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 4000
    batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd"] = "wsd"
    weight_decay: float = 0.01
    save_steps: int = 250
    logging_steps: int = 25
    ema_decay: float = 0.998
    prompt_dropout: float = 0.1
    task: Literal["all", "words", "by-word"] = "all"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    sample_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._from_one("sample_steps")
        for name in ("ema_decay", "prompt_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected a share from 0 to below 1.")


@dataclass(frozen=True)
class Form:
    """Sizes that go together: a model's, and those of its training."""

    shape: Shape
    config: DitConfig


FULL = Form(Shape(width=224, single=4), DitConfig())
SMALL = Form(  # at most 20 minutes on two cores
    Shape(width=128, single=4), DitConfig(steps=2200, learning_rate=1.5e-3, task="words")
)
SHORT = DitConfig(steps=300, learning_rate=5e-4, warmup_steps=50)  # of a model that is trained already
ADAPTER_RATE = 2e-3  # learning rate of adapters in that, which begin at nothing


class DitTrainer:
    """One run, in the folder `output`. The pipeline is trained in place, and at the end has the average of its weights.

    Args:
        pipeline: what is trained.
        output: folder of checkpoints and sheets, and in the end of the pipeline.
    """

    def __init__(self, pipeline: PixelEditPipeline, config: DitConfig, emoji: Emoji, output: Path) -> None:
        self.pipeline, self.config, self.emoji, self.output = pipeline, config, emoji, output
        halves = config.precision == "bf16" or (config.precision == "auto" and fast_bf16())
        self.accelerator = Accelerator(
            mixed_precision="bf16" if halves else "no", cpu=not torch.accelerator.is_available()
        )
        model = EditModel(pipeline)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decayed = [p for p in self.trained.values() if p.ndim > 1]
        others = [p for p in self.trained.values() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate, betas=(0.9, 0.99), fused=True,
        )  # fmt: skip
        self.own = model  # without what DDP puts around it
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.step, self.history = 0, list[dict[str, float]]()
        self.stopped = False

    def run(self, progress: Progress, say: Say) -> list[dict[str, float]]:
        """Train from the last checkpoint to the end; see `train_dit`."""
        if (checkpoint := last_checkpoint(self.output)) is not None:
            self.restore(checkpoint)
        losses: list[torch.Tensor] = []
        while self.step < self.config.steps:
            losses.append(self._take_step())
            self.step += 1
            stops = self.stopped and self.step < self.config.steps
            self._log(losses, say, stops)
            if self._is_time(self.config.save_steps) or stops:
                self.save()
            progress(self.step, self.config.steps)
            if stops:
                raise UserError(f"Interrupted behind step {self.step}, which is saved: the same command goes on there.")
        return self.history

    def _take_step(self) -> torch.Tensor:
        config, process = self.config, self.accelerator.process_index
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        loss = self._loss(self.step * self.accelerator.num_processes + process)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.trained.values(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        kept = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.trained.items():
                self.average[name].lerp_(parameter, 1 - kept)
        return loss.detach()

    def _loss(self, number: int) -> torch.Tensor:
        """Of the batch of that number."""
        config = self.config
        batch = training_batch(
            self.emoji, config.batch_size, config.seed, number, config.prompt_dropout, TASKS[config.task]
        )
        seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1, np.uint64)[0] >> 1)
        with self.accelerator.autocast():
            loss: torch.Tensor = self.model(self._inputs(batch, seed))
        return loss

    def _inputs(self, batch: Batch, seed: int) -> dict[str, torch.Tensor]:
        inputs = prepared(batch, self.pipeline.tokenizer, self.pipeline.config.patch, seed)
        return {name: value.to(self.accelerator.device) for name, value in inputs.items()}

    def _is_time(self, steps: int) -> bool:
        return self.step % steps == 0 or self.step == self.config.steps

    def _log(self, losses: list[torch.Tensor], say: Say, stops: bool) -> None:
        """What a line is the mean of is not saved: with every checkpoint a new one begins."""
        if self._is_time(self.config.logging_steps) or self._is_time(self.config.save_steps) or stops:
            mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            losses.clear()
            if not mean - mean == 0:
                raise UserError(f"The loss is {mean} at step {self.step}: the learning rate may be too high.")
            rate = learning_rate(self.step - 1, self.config)
            self._say({"step": self.step, "loss": mean, "learning_rate": rate}, say)
        if self._is_time(self.config.eval_steps):
            self._say({"step": self.step, **self.measure()}, say)
        if self._is_time(self.config.sample_steps) and self.accelerator.is_main_process:
            self.sheet(self.output / "samples" / f"step-{self.step}.png")

    def _say(self, entry: dict[str, float], say: Say) -> None:
        self.history.append(entry)
        if self.accelerator.is_main_process:
            say(entry)

    def measure(self) -> dict[str, float]:
        """Loss of the averaged weights on concepts that are held out, by the number of references."""
        with self._averaged(), self.accelerator.autocast():
            return held_out_losses(self.own, self.pipeline, self.emoji, TASKS[self.config.task])

    def sheet(self, file: Path, rows: int = 8) -> None:
        """Pictures of held-out concepts: references, what the averaged weights draw, and what there is to draw."""
        concepts = self.emoji.concepts(held_out=True).tolist()[:rows]
        with self._averaged(), self.accelerator.autocast():
            picture = sheet(self.pipeline, self.emoji, concepts)
        write_picture(picture, file)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the averaged weights in the place of the last ones."""
        last = {name: p.detach().clone() for name, p in self.trained.items()}
        _fill(self.trained, self.average)
        try:
            yield
        finally:
            _fill(self.trained, last)

    def save(self) -> None:
        """Write a checkpoint, and forget all but the last two."""
        if self.accelerator.is_main_process:
            folder = self.output / CHECKPOINTS
            tensors = {f"model.{name}": p.detach() for name, p in self.trained.items()}
            tensors |= {f"average.{name}": value for name, value in self.average.items()}
            for name, parameter in self.trained.items():
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"{key}.{name}"] = value
            with atomic_path(folder / f"checkpoint-{self.step}") as temporary:
                temporary.mkdir()
                save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / _TENSORS)
                (temporary / STATE).write_text(json.dumps({"step": self.step, "history": self.history}))
            _forget(folder)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        try:
            state = json.loads((checkpoint / STATE).read_text())
            tensors = load_file(checkpoint / _TENSORS, device=str(self.accelerator.device))
            with torch.no_grad():
                for name, parameter in self.trained.items():
                    parameter.copy_(tensors[f"model.{name}"])
                    self.average[name].copy_(tensors[f"average.{name}"])
                    keys = ("step", "exp_avg", "exp_avg_sq")
                    self.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in keys}
            self.step, self.history = state["step"], state["history"]
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{checkpoint} cannot be read ({type(error).__name__}): delete it, and the run goes on from the one "
                "before."
            ) from error

    def finish(self) -> None:
        """Put the averaged weights into the pipeline, adapters into the weights they adapt, and write it."""
        _fill(self.trained, self.average)
        if getattr(self.pipeline.transformer, "_hf_peft_config_loaded", False):
            self.pipeline.transformer.fuse_lora()
            self.pipeline.transformer.unload_lora()
        if self.accelerator.is_main_process:
            unfinished = self.output / _UNFINISHED
            self.pipeline.save_pretrained(unfinished)
            move_into(self.output, unfinished, "model_index.json")
        self.accelerator.wait_for_everyone()


@torch.no_grad()
def held_out_losses(
    model: EditModel, pipeline: PixelEditPipeline, emoji: Emoji, kinds: Sequence[Kind]
) -> dict[str, float]:
    """`held_out_K`: the loss with K references, on concepts that are held out."""
    found: dict[str, list[float]] = {}
    concepts = emoji.concepts(held_out=True).tolist()[:64]
    for number, kind in enumerate(kinds):
        batch = draw(emoji, kind, concepts, np.random.default_rng(number))
        inputs = prepared(batch, pipeline.tokenizer, pipeline.config.patch, number)
        loss = model({name: value.to(pipeline.device) for name, value in inputs.items()})
        found.setdefault(f"held_out_{kind.references}", []).append(loss.item())
    return {name: sum(losses) / len(losses) for name, losses in sorted(found.items())}


@torch.no_grad()
def _fill(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def _forget(folder: Path) -> None:
    """All checkpoints but the last ones."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of)
    for checkpoint in found[:-_KEPT]:
        shutil.rmtree(checkpoint)


def make_cacheable(
    pipeline: PixelEditPipeline, references: str = "set", rank: int | None = None, seed: int = 0
) -> None:
    """Prepare a pipeline for a short training after which `KleinKV` is exact for it: its references see what they may.

    Args:
        pipeline: changed in place; with adapters only these are trained, and `train_dit` merges them.
        references: `set` or `each`, see `PixelEditPipeline`.
        rank: of LoRA adapters on the transformer's linear layers; None trains all weights.
        seed: of the adapters.

    Raises:
        UserError: it is cacheable as it is, or there is no such rank.
    """
    if references not in ("set", "each"):
        raise UserError(f"references={references!r}: expected set or each, which can be cached.")
    if pipeline.config.references == references:
        raise UserError(f"The references of this model see no more than {references} allows: it is cacheable already.")
    if rank is not None and rank < 1:
        raise UserError(f"rank={rank}: expected at least 1.")
    pipeline.register_to_config(references=references)
    if rank is not None:
        from peft import LoraConfig

        pipeline.text_encoder.requires_grad_(False)
        names = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
        blocks = [name for name in names if "transformer_blocks" in name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=blocks))


def train_dit(
    pipeline: PixelEditPipeline,
    config: DitConfig,
    emoji: Emoji,
    output: Path,
    progress: Progress = lambda done, total: None,
    say: Say = lambda entry: None,
) -> list[dict[str, float]]:
    """Train `pipeline` in place, with checkpoints and sheets of pictures below `output`, and write it to `output`.

    Where there are checkpoints of a run that was stopped it goes on from the last whole one, with the same steps.

    Args:
        progress: called with (steps done, steps).
        say: called with each entry that is logged.

    Returns:
        What was logged, in order: `step` with `loss` and `learning_rate`, or with `held_out_K`, the loss on held-out
        concepts with K references.

    Raises:
        UserError: a checkpoint is damaged, the loss is no longer finite, or it was interrupted behind a checkpoint.
    """
    trainer = DitTrainer(pipeline, config, emoji, output)
    with writing(output), interruptible(trainer, trainer.accelerator.num_processes == 1), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # norms stay fp32
        history = trainer.run(progress, say)
        trainer.finish()
    return history
