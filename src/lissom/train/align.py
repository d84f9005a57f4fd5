"""Learning from reward: a run of one of TRL's trainers as we extend them, resumable, with held-out prompts measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import GRPOConfig

from lissom.errors import UserError
from lissom.models.method import check_types
from lissom.rl.band import BandPOTrainer, TokenBounds
from lissom.rl.trainer import RewardTrainer
from lissom.rl.tree_search.trainer import DistillConfig, TreeDistillTrainer
from lissom.rl.value_prior import Budget, ValuePriorConfig, ValuePriorTrainer
from lissom.rl.world import World, judged
from lissom.train.folder import CHECKPOINTS, last_checkpoint
from lissom.train.interrupt import interruptible
from lissom.train.run import Progress, Say, Watch, go_on, leave, without_noise

Method = Literal["grpo", "bandpo", "v05", "tree-distill"]
Settings = TokenBounds | ValuePriorConfig | DistillConfig


@dataclass(frozen=True)
class AlignConfig:
    """A run of learning from reward. A *step* is a batch of rollouts and all that is learned from it.

    Attributes:
        method: `grpo`: TRL's own; `bandpo`: with bounds of the ratio for each token, see `lissom.rl.band`; `v05`: with
            a prior and groups of several sizes, see `lissom.rl.value_prior`; `tree-distill`: on what a tree search has
            found, one completion of each prompt, see `lissom.rl.tree_search`.
        steps: batches of rollouts.
        prompts: of a step.
        num_generations: completions of each; not of `tree-distill`.
        minibatches: parts of a step that the optimiser makes a step of its own for. With one, and `num_iterations` 1,
            all ratios are 1 and no clip does anything.
        num_iterations: how often a step's rollouts are gone over.
        micro_batches: parts of a minibatch that are read at a time, to save memory.
        learning_rate: it rises over the first twentieth, and then stays.
        max_completion_length: tokens.
        temperature: of rollouts.
        beta: weight of the divergence from the policy that the run began with.
        loss_type: of TRL.
        scale_rewards: what advantages are divided by: `group`: the deviation of a prompt's rewards (GRPO); `batch`: of
            all; `none`.
        max_grad_norm: largest norm of a step's gradient.
        seed: of the order of prompts, and of rollouts.
        token_budget: generated tokens after which the run ends, whatever its steps are; None: none.
        eval_steps, eval_completions: how often held-out prompts are measured, and completions of each.
        save_steps: steps between checkpoints.
        use_vllm: generate with vLLM, which must be installed: TRL's own switch.

    Raises:
        UserError: a value is out of range, or batches do not divide.
    """

    method: Method = "grpo"
    steps: int = 100
    prompts: int = 32
    num_generations: int = 8
    minibatches: int = 4
    num_iterations: int = 1
    micro_batches: int = 1
    learning_rate: float = 1e-6
    max_completion_length: int = 256
    temperature: float = 1.0
    beta: float = 0.0
    loss_type: str = "grpo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    max_grad_norm: float = 1.0
    seed: int = 0
    token_budget: int | None = None
    eval_steps: int = 20
    eval_completions: int = 16
    save_steps: int = 20
    logging_steps: int = 1
    report_to: Literal["none", "tensorboard", "trackio"] = "none"
    use_vllm: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        ones = ("steps", "prompts", "minibatches", "num_iterations", "micro_batches", "max_completion_length",
                "eval_steps", "eval_completions", "save_steps", "logging_steps")  # fmt: skip
        for name in ones:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.num_generations < 2:
            raise UserError(f"num_generations={self.num_generations}: a group needs at least 2 to be compared in.")
        if self.completions % (self.minibatches * self.micro_batches):
            raise UserError(
                f"{self.completions} completions of a step do not divide into {self.minibatches} minibatches of "
                f"{self.micro_batches} parts."
            )
        for name in ("learning_rate", "temperature", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{name}={getattr(self, name)}: expected a number above 0.")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise UserError(f"beta={self.beta}: expected a number from 0.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: expected a number from 0 to below 2^32.")

    @property
    def completions(self) -> int:
        """Of a step."""
        return self.prompts * (1 if self.method == "tree-distill" else self.num_generations)

    @property
    def updates(self) -> int:
        """Steps of the optimiser in one of ours."""
        return self.minibatches * self.num_iterations


def align(
    config: AlignConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    output: Path,
    settings: Settings | None = None,
    progress: Progress = lambda done, total: None,
    say: Say = lambda entry: None,
) -> list[dict[str, float]]:
    """Train `model` in place on the reward of `world`, with checkpoints below `output`, and write it to `output`.

    Where there are checkpoints of a run that was stopped it goes on from the last whole one. Ctrl-C ends it behind the
    step of the optimiser that is being made; what was learned since the last batch of rollouts began is made again.

    Args:
        settings: of the method: bounds of `bandpo`, by default `BandConfig()`; prior, baseline and budget of `v05`, by
            default `ValuePriorConfig()` with a budget that begins with `num_generations`; search and target of
            `tree-distill`, by default `DistillConfig()`, for the world's range of rewards.
        progress: called with (steps of the optimiser done, all).
        say: called with each entry that is logged.

    Returns:
        What was logged, in order, by step of the optimiser: TRL's metrics, `tokens/generated` and so on, and for
        held-out prompts `mean@K` and `best@K`.

    Raises:
        UserError: batches do not divide over the processes, a reward function is wrong, a checkpoint is damaged, or it
            was interrupted.
    """
    watch = Watch(progress, say)
    trainer = _trainer(config, model, tokenizer, world, output, settings, [watch])
    with without_noise():
        with interruptible(watch, alone=trainer.args.world_size == 1):
            go_on(trainer, watch, last_checkpoint(output), trainer.args.max_steps)
        done = trainer.state.global_step
        if done < trainer.args.max_steps and not trainer.book.is_spent:
            raise UserError(f"Interrupted behind step {done}, which is saved: the same command goes on there.")
        leave(trainer, tokenizer, output)
    return [entry for entry in trainer.state.log_history if "loss" in entry or _is_measured(entry)]


def _trainer(
    config: AlignConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, output: Path,
    settings: Settings | None, callbacks: list[TrainerCallback],
) -> RewardTrainer:  # fmt: skip
    kind, options = _kind(config, world, settings)
    measuring = _Measuring(config, tokenizer, world)
    trainer = kind(
        model,
        reward_funcs=world.reward,
        args=_arguments(config, str(output / CHECKPOINTS)),
        train_dataset=Dataset.from_list(list(world.train)),
        processing_class=tokenizer,
        callbacks=[*callbacks, measuring],
        reward_range=world.reward_range,
        token_budget=config.token_budget,
        **options,
    )
    measuring.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    return trainer


def _kind(config: AlignConfig, world: World, settings: Settings | None) -> tuple[type[RewardTrainer], dict[str, Any]]:
    """The trainer of the method, and what it is given of its own."""
    if config.method == "grpo":
        if settings is not None:
            raise UserError("The method grpo has no settings.")
        return RewardTrainer, {}
    fits = {
        "bandpo": hasattr(settings, "bounds"),
        "v05": isinstance(settings, ValuePriorConfig),
        "tree-distill": isinstance(settings, DistillConfig),
    }
    if settings is not None and not fits[config.method]:
        raise UserError(f"These settings are of another method than {config.method}.")
    if config.method == "bandpo":
        return BandPOTrainer, {"band": settings}
    if config.method == "v05":
        budget = Budget(config.num_generations, max(config.num_generations, Budget().most))
        return ValuePriorTrainer, {"value_prior": settings or ValuePriorConfig(budget=budget)}
    if world.reward_range is None:
        raise UserError("A search needs the range of rewards: state it.")
    chosen = settings if isinstance(settings, DistillConfig) else DistillConfig()
    low, high = world.reward_range
    return TreeDistillTrainer, {"distill": replace(chosen, search=replace(chosen.search, low=low, high=high))}


def _arguments(config: AlignConfig, folder: str) -> GRPOConfig:
    from accelerate import PartialState

    processes = PartialState().num_processes
    parts = processes * config.minibatches * config.micro_batches
    if config.completions % parts:
        raise UserError(f"{config.completions} completions of a step do not divide over {processes} processes.")
    return GRPOConfig(
        output_dir=folder,
        max_steps=config.steps * config.updates,
        per_device_train_batch_size=config.completions // parts,
        gradient_accumulation_steps=config.micro_batches,
        steps_per_generation=config.minibatches * config.micro_batches,
        # A tree has no group; TRL wants one, which the trainer takes back.
        num_generations=config.completions if config.method == "tree-distill" else config.num_generations,
        num_iterations=config.num_iterations,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, config.steps * config.updates // 20),
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        beta=config.beta,
        loss_type=config.loss_type,
        epsilon_high=5.0 if config.loss_type == "cispo" else None,  # CISPO's is no clip of the same size
        scale_rewards=config.scale_rewards,
        use_vllm=config.use_vllm,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        save_steps=config.save_steps * config.updates,
        save_total_limit=2,
        logging_steps=config.logging_steps * config.updates,
        report_to=config.report_to,
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )


class _Measuring(TrainerCallback):
    """Measures held-out prompts before the first step, every `eval_steps`, and behind the last."""

    trainer: RewardTrainer

    def __init__(self, config: AlignConfig, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
        self.config, self.tokenizer, self.world = config, tokenizer, world

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._measure()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = self.config.eval_steps * self.config.updates
        if state.global_step % every == 0 or state.global_step == state.max_steps or control.should_training_stop:
            due = control.should_log
            self._measure()
            control.should_log = due  # what was logged in between has taken it away

    def _measure(self) -> None:
        """On the first process; others wait for it."""
        config, trainer = self.config, self.trainer
        entry: dict[str, float] = {}
        if trainer.is_world_process_zero():
            found = judged(
                trainer.accelerator.unwrap_model(trainer.model), self.tokenizer, self.world, config.eval_completions,
                config.max_completion_length, config.temperature,
            )  # fmt: skip
            entry = {
                f"mean@{config.eval_completions}": float(found.mean()),
                f"best@{config.eval_completions}": float(found.max(1).mean()),
            }
        trainer.accelerator.wait_for_everyone()
        if entry:
            trainer.record(entry | {"tokens/generated": float(trainer.ledger.generated)})


def _is_measured(entry: dict[str, float]) -> bool:
    return any(name.startswith("mean@") for name in entry)
