"""Learning rate and weight decay as functions of the step alone."""

from __future__ import annotations

import math

from lissom.train.config import Schedule, TrainConfig


def learning_rate(step: int, config: Schedule) -> float:
    """Of a step, counted from 0."""
    highest, least = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return highest * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return least + (highest - least) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    start = max(config.warmup_steps, round(config.steps * (1 - config.decay_share)))
    done = (step - start) / max(1, config.steps - start)
    return highest - (highest - least) * min(1.0, max(0.0, done))


def weight_decay(step: int, config: TrainConfig) -> float:
    """Of a step, counted from 0."""
    if config.weight_decay_until is None:
        return config.weight_decay
    done = step / (config.steps * config.weight_decay_until)
    return config.weight_decay * (1 + math.cos(math.pi * min(1.0, done))) / 2
