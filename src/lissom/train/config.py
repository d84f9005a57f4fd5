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
        logits: weight of the Kullback-Leibler divergence from the teacher's distribution of the next token.
        hidden: weight of the squared distance to the teacher's hidden states after each layer, relative to their size.
        labels: weight of the cross-entropy with the text itself.
        temperature: of both distributions; the divergence is multiplied by its square.
    """

    logits: float = 1.0
    hidden: float = 1.0
    labels: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.logits, self.hidden, self.labels) < 0 or not self.logits + self.hidden + self.labels > 0:
            raise UserError("logits, hidden and labels are weights of the loss: none below 0, and not all of them 0.")
        if not self.temperature > 0:
            raise UserError(f"temperature={self.temperature}: expected a number above 0.")


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The optimiser is AdamW; defaults are Sparse-BitNet's but for sizes.

    Attributes:
        steps: of the optimiser.
        context: tokens of a window.
        batch_size: windows that a process takes at a time.
        accumulate: of those in a step.
        learning_rate: the highest.
        least_rate: the last, of the same unit.
        warmup: steps in which it rises from 0.
        schedule: `cosine`, or `wsd`: constant, then falling linearly over the last `decay_share` of the steps.
        decay_share: see `schedule`.
        weight_decay: of matrices; norms and biases have none.
        weight_decay_until: share of the steps over which it falls to 0, by a cosine (Sparse-BitNet, ternary: 0.5); None
            leaves it as it is.
        beta1, beta2: of AdamW.
        clip: largest norm of a step's gradient.
        precision: `fp32`, or `bf16` for products (weights and the optimiser stay fp32).
        checkpointing: forget activations and compute them again, which needs less memory and more time.
        seed: of the order of windows.
        evaluate_every: steps between measurements on held-out text; the last step is always measured.
        save_every: steps between checkpoints.
        log_every: steps.
        tracking: `none`, `tensorboard` or `trackio`, which must be installed.

    Raises:
        UserError: a value is out of range.
    """

    steps: int = 1000
    context: int = 512
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    least_rate: float = 1e-5
    warmup: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_share: float = 0.2
    weight_decay: float = 0.1
    weight_decay_until: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: bool = False
    seed: int = 0
    evaluate_every: int = 500
    save_every: int = 500
    log_every: int = 20
    tracking: Literal["none", "tensorboard", "trackio"] = "none"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("learning_rate", "least_rate", "weight_decay", "clip"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}: expected a finite number.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: expected a number from 0 to below 2^32.")
        if self.tracking != "none" and find_spec(self.tracking) is None:
            raise UserError(
                f"tracking={self.tracking!r} needs a package that is not there: pip install {self.tracking}"
            )
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.context < 2:
            raise UserError(f"context={self.context}: expected at least 2 tokens.")
        if not self.learning_rate > 0 or not 0 <= self.least_rate <= self.learning_rate:
            raise UserError(
                f"learning_rate={self.learning_rate}, least_rate={self.least_rate}: expected 0 <= least <= highest > 0."
            )
        if not 0 <= self.warmup < self.steps:
            raise UserError(f"warmup={self.warmup}: expected fewer steps than {self.steps}.")
        for name in ("decay_share", "weight_decay_until"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{name}={share}: expected a share above 0, up to 1.")
        if self.weight_decay < 0 or not self.clip > 0:
            raise UserError("Expected weight_decay from 0 and clip above 0.")
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise UserError("Expected beta1 and beta2 from 0 to below 1.")
