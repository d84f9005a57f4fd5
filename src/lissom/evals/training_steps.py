"""What a step of training costs: time, memory that is kept for the gradients, and operations."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from lissom.devices.meters import interleaved
from lissom.train.distill import cross_entropy

_WARM = 2  # rounds that do not count


def rounds_of(
    works: Mapping[str, Callable[[], Any]],
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[float]]:
    """Seconds of each of `works`, one number per round, all in turn in each round. An accelerator is waited for.

    Args:
        progress: called with (rounds done, rounds).
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    timed = {name: partial(_seconds, work) for name, work in works.items()}
    for number, (name, taken) in enumerate(interleaved(timed, rounds + _WARM), 1):
        if number > _WARM * len(works):
            seconds[name].append(taken)
        progress(max(0, number // len(works) - _WARM), rounds)
    return seconds


def _seconds(work: Callable[[], Any]) -> float:
    _wait()
    begin = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - begin


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def loss_of(model: Any, ids: torch.Tensor, bf16: bool = False) -> torch.Tensor:
    """Nats per token of `ids`, `[batch, tokens]`, by a model that has gradients; with `bf16` under autocast."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        return cross_entropy(model(input_ids=ids, use_cache=False).logits, ids)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, bf16: bool = False) -> None:
    """One step of training on `ids`."""
    loss_of(model, ids, bf16).backward()
    optimizer.step()
    optimizer.zero_grad()


def kept_bytes(model: PreTrainedModel, work: Callable[[], Any]) -> int:
    """What `work`, a forward pass of `model`, keeps for the gradients beside the parameters, each storage once."""
    held: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its place in memory would be another tensor's
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(held.values())


def operations(model: PreTrainedModel) -> float:
    """Floating point operations of a training step's products with weights, per token: 6 for each entry of a matrix."""
    embedding = model.get_input_embeddings().weight
    return 6.0 * sum(p.numel() for p in model.parameters() if p.ndim == 2 and p is not embedding)
