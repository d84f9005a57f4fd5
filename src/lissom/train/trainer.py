"""transformers' Trainer with the schedules, the loss and the telemetry of `TrainConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lissom.errors import UserError
from lissom.files import writing
from lissom.train.config import Distillation, TrainConfig
from lissom.train.data import TokenWindows
from lissom.train.distill import cross_entropy, hidden_distance, kl_divergence
from lissom.train.schedule import learning_rate, weight_decay
from lissom.training_plugin import method_in_training


class CausalTrainer(Trainer):
    """Trains a causal language model on windows of tokens.

    Its checkpoints are transformers', and `train(resume_from_checkpoint=...)` goes on from them exactly: the same
    steps, and the same log but for a line that an interruption adds. The method that the model is in training with is
    told of every step, and what it measures is logged.

    Args:
        checkpoints: folder for them.
        held_out: windows that are measured every `eval_steps`.
        teacher: model of the same vocabulary, which is not changed.

    Raises:
        UserError: there are fewer windows than a batch, or the teacher does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        checkpoints: Path,
        windows: TokenWindows,
        held_out: TokenWindows | None = None,
        teacher: PreTrainedModel | None = None,
        distillation: Distillation | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.config = config
        method = method_in_training(model)
        self.training = None if method is None else method.training(model)
        self.distillation = None if teacher is None else distillation or Distillation()
        self.parts: dict[str, list[torch.Tensor]] = {}
        super().__init__(
            model=model,
            args=_arguments(config, str(checkpoints), held_out is not None),
            train_dataset=windows,
            eval_dataset=held_out,
            data_collator=_stacked,
            callbacks=[*(callbacks or []), _EachStep(self)],
        )
        self.remove_callback(PrinterCallback)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.can_return_loss = True
        self.model_accepts_loss_kwargs = False  # every window has as many tokens: means of means are the mean
        taken = self.args.train_batch_size * self.args.world_size
        if len(windows) < taken:
            raise UserError(
                f"The text has {len(windows)} windows of {config.context} tokens: fewer than a batch of {taken}."
            )
        self.teacher = None
        if teacher is not None:
            _check_teacher(model, teacher, self.distillation)
            self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with the method's groups, or with those that any model has."""
        if self.optimizer is None and self.training is not None:  # type: ignore[has-type]
            groups = self.training.parameter_groups(
                self.model if model is None else model, self.config.learning_rate, self.config.weight_decay
            )
            if groups is not None:
                kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
                self.optimizer = kind(groups, **options)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The learning rate as a function of the step."""
        if self.lr_scheduler is None:
            self.lr_scheduler: LambdaLR = LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate(step, self.config) / self.config.learning_rate
            )
        return self.lr_scheduler

    def begin_step(self, step: int) -> None:
        """What depends on the step and is not the learning rate."""
        if self.training is not None:
            self.training.begin_step((step + 1) / self.config.steps)
        if self.optimizer is not None:
            decay = weight_decay(step, self.config)
            for group in self.optimizer.param_groups:
                if group["weight_decay"] or group.get("decays"):
                    group["decays"], group["weight_decay"] = True, decay

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy, or in training with a teacher what `Distillation` says."""
        ids, settings = inputs["input_ids"], self.distillation
        if settings is None or self.teacher is None or not model.training:
            outputs = model(input_ids=ids, use_cache=False)
            loss = cross_entropy(outputs.logits, ids)
            return (loss, {"loss": loss}) if return_outputs else loss
        wanted = settings.hidden > 0
        outputs = model(input_ids=ids, use_cache=False, output_hidden_states=wanted)
        with torch.no_grad(), self.autocast_smart_context_manager():
            teacher = self.teacher(input_ids=ids, use_cache=False, output_hidden_states=wanted)
        parts = {"nll": cross_entropy(outputs.logits, ids)}
        parts["kl"] = kl_divergence(outputs.logits, teacher.logits, settings.temperature)
        loss = settings.labels * parts["nll"] + settings.kl * parts["kl"]
        if wanted:
            parts["hidden"] = hidden_distance(outputs.hidden_states[1:], teacher.hidden_states[1:])
            loss = loss + settings.hidden * parts["hidden"]
        for name, value in parts.items():
            self.parts.setdefault(name, []).append(value.detach())
        return (loss, {"loss": loss}) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """All of the held-out text: it is only in training that batches must be full."""
        self.args.dataloader_drop_last = False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = True

    def require_finite(self) -> None:
        """Raise a `UserError` where a weight is NaN or infinite, on whichever process."""
        local = [getattr(parameter, "_local_tensor", parameter) for parameter in self.model.parameters()]
        damaged = sum((~torch.isfinite(tensor)).any() for tensor in local)
        if int(self.accelerator.reduce(torch.as_tensor(damaged, device=self.args.device).long(), "sum")):
            raise UserError(
                f"Weights are not finite at step {self.state.global_step}: the learning rate may be too high."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As `from_pretrained` does: in files of some architectures tensors have other names, or are of other shapes,
        than in the model, and transformers' own would pass them over."""
        target = self.model if model is None else model
        if self.is_fsdp_enabled or not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        loaded, found = type(target).from_pretrained(
            resume_from_checkpoint, dtype=target.dtype, output_loading_info=True
        )
        if found["missing_keys"] or found["mismatched_keys"]:
            raise ValueError("tensors are missing")
        target.load_state_dict(loaded.state_dict())

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        with writing(self.args.output_dir):
            super()._save_checkpoint(*arguments, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, and what methods measure of themselves."""
        if "loss" in logs:
            for name, values in self.parts.items():
                logs[name] = float(self.accelerator.reduce(torch.stack(values).mean(), "mean"))
            self.parts.clear()
            if self.training is not None:
                logs |= self.training.measures()
        super().log(logs, start_time)


def _arguments(config: TrainConfig, folder: str, evaluates: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps,
        prediction_loss_only=True,
        label_names=[],  # windows are their own labels
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        report_to=config.report_to,
        seed=config.seed,
        data_seed=config.seed,
        disable_tqdm=True,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
    )


class _EachStep(TrainerCallback):
    def __init__(self, trainer: CausalTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            self.trainer.require_finite()
            control.should_log = True  # what a line is the mean of is not saved: a run that goes on begins a new one

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss"):
            loss = (logs or {}).get(name)
            if loss is not None and not loss - loss == 0:
                raise UserError(
                    f"The loss is {loss} at step {state.global_step}: the learning rate may be too high. "
                    "The last checkpoint is as it was."
                )


def _stacked(windows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack([window["input_ids"] for window in windows])}


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, settings: Distillation | None) -> None:
    ours, theirs = (m.config.get_text_config(decoder=True) for m in (model, teacher))
    if ours.vocab_size != theirs.vocab_size:
        raise UserError(
            f"The teacher has {theirs.vocab_size} tokens, the model {ours.vocab_size}: they must be the same."
        )
    sizes = [(config.num_hidden_layers, config.hidden_size) for config in (ours, theirs)]
    if settings is not None and settings.hidden and sizes[0] != sizes[1]:
        raise UserError(
            "The teacher has other layers than the model: leave out hidden states, with hidden=0 (--teacher-hidden 0)."
        )
