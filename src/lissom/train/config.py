"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from lissom.errors import UserError
from lissom.models.method import check_types


@dataclass(frozen=True)
class Distillation:
    """How much of the loss is a teacher's.

    Attributes:
        kl: weight of the Kullback-Leibler divergence from the teacher's distribution of the next token.
        hidden: weight of the squared distance to the teacher's hidden states after each layer, relative to their size.
        labels: weight of the cross-entropy with the text itself.
        temperature: of both distributions; the divergence is multiplied by its square.
    """

    kl: float = 1.0
    hidden: float = 1.0
    labels: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.kl, self.hidden, self.labels) < 0 or not self.kl + self.hidden + self.labels > 0:
            raise UserError("kl, hidden and labels are weights of the loss: none below 0, and not all of them 0.")
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature}: expected a number above 0.")


@dataclass(frozen=True)
class Schedule:
    """What all training runs have: steps of AdamW, their learning rates, and how often something is looked at.

    Attributes:
        steps: of the optimiser.
        batch_size: what a process takes at a time: windows of text, or requests for pictures.
        learning_rate: the highest.
        min_learning_rate: the last, of the same unit.
        warmup_steps: steps in which it rises from 0.
        schedule: `cosine`, or `wsd`: constant, then falling linearly over the last `decay_share` of the steps.
        decay_share: see `schedule`.
        weight_decay: of matrices; norms and biases have none.
        max_grad_norm: largest norm of a step's gradient.
        seed: of what is drawn, and of its order.
        eval_steps: steps between measurements on what is held out; the last step is always measured.
        save_steps: steps between checkpoints.
        logging_steps: steps between lines of the log.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 3e-4
    min_learning_rate: float = 1e-5
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_share: float = 0.2
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_steps: int = 500
    save_steps: int = 500
    logging_steps: int = 20

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("learning_rate", "min_learning_rate", "weight_decay", "max_grad_norm"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}: expected a finite number.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: expected a number from 0 to below 2^32.")
        self._from_one("steps", "batch_size", "eval_steps", "save_steps", "logging_steps")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate={self.learning_rate}: expected a number above 0.")
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise UserError(f"min_learning_rate={self.min_learning_rate}: expected 0 to {self.learning_rate}.")
        if not 0 <= self.warmup_steps < self.steps:
            raise UserError(f"warmup_steps={self.warmup_steps}: expected fewer steps than {self.steps}.")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"decay_share={self.decay_share}: expected a share above 0, up to 1.")
        if self.weight_decay < 0 or not self.max_grad_norm > 0:
            raise UserError("Expected weight_decay from 0 and max_grad_norm above 0.")

    def _from_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")


@dataclass(frozen=True)
class TrainConfig(Schedule):
    """A training run of a language model; defaults are Sparse-BitNet's for floating point models, but for sizes.

    Attributes:
        context: tokens of a window.
        gradient_accumulation_steps: windows of `batch_size` in a step.
        weight_decay_until: share of the steps over which it falls to 0, by a cosine (Sparse-BitNet, ternary: 0.5); None
            leaves it as it is.
        beta1, beta2: of AdamW.
        precision: `fp32`, or `bf16` for products (weights and the optimiser stay fp32).
        gradient_checkpointing: forget activations and compute them again, which needs less memory and more time.
        report_to: `none`, `tensorboard` or `trackio`, which must be installed.

    Raises:
        UserError: a value is out of range.
    """

    context: int = 512
    gradient_accumulation_steps: int = 1
    weight_decay_until: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    report_to: Literal["none", "tensorboard", "trackio"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.report_to != "none" and find_spec(self.report_to) is None:
            raise UserError(
                f"report_to={self.report_to!r} needs a package that is not there: pip install {self.report_to}"
            )
        self._from_one("gradient_accumulation_steps")
        if self.context < 2:
            raise UserError(f"context={self.context}: expected at least 2 tokens.")
        if self.weight_decay_until is not None and not 0 < self.weight_decay_until <= 1:
            raise UserError(f"weight_decay_until={self.weight_decay_until}: expected a share above 0, up to 1.")
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise UserError("Expected beta1 and beta2 from 0 to below 1.")
