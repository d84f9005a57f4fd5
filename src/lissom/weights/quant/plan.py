"""Which matrices get 8 bits instead of 4: those whose rounding costs the most per byte.

The cost of a matrix is predicted to second order. With the losses' gradient g at the layer's output and the change d of
that output by the rounded weights, the mean loss grows by about half the mean of (g · d)², the Gauss-Newton term with
the empirical Fisher matrix, over the tokens of the calibration text. One backward pass gives it for all matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from lissom.errors import UserError
from lissom.kernels.packed import Packed, unpack
from lissom.kernels.packed_layers import exchanged
from lissom.kernels.rounding import GRIDS, rtn
from lissom.weights.quant.apply import Progress, Statistics, weight_of
from lissom.weights.quant.config import FINE, Quantize
from lissom.weights.quant.search import search

_WINDOWS = 4  # of the calibration text


@dataclass
class Choice:
    """A matrix with 4 and with 8 bits, and what either adds to the mean loss as predicted (nats per token)."""

    name: str
    packed: dict[str, Packed]
    cost: dict[str, float] = field(default_factory=dict)

    def gain(self, coarse: str) -> float:
        """Predicted loss that 8 bits save, per byte."""
        more = self.packed[FINE].nbytes - self.packed[coarse].nbytes
        return (self.cost[coarse] - self.cost[FINE]) / more


def mixed_formats(
    model: PreTrainedModel,
    settings: Quantize,
    layers: list[dict[str, nn.Module]],
    ids: torch.Tensor,
    progress: Progress,
) -> dict[str, str]:
    """Format of each matrix, by name, within the budget of `settings`. `model` is as it was afterwards.

    The codes that are compared are those of the search (or of round-to-nearest): GPTQ loses less than is planned for.

    Raises:
        UserError: 8 bits everywhere lose more than `max_loss`.
    """
    modules = {name: module for layer in layers for name, module in layer.items()}
    ids = ids[:_WINDOWS].to(model.device)
    choices = _choices(model, settings, modules, ids, progress)
    _measure(model, {choice.name: choice for choice in choices}, modules, ids, progress)
    order = sorted(choices, key=lambda choice: choice.gain(settings.coarse), reverse=True)
    if settings.target_bits is not None:
        fine = within_bits(order, settings.coarse, settings.target_bits)
    else:
        assert settings.max_loss is not None
        fine = _within_loss(model, order, settings.coarse, settings.max_loss, ids, progress)
    return {choice.name: FINE if choice.name in fine else settings.coarse for choice in choices}


def within_bits(order: list[Choice], coarse: str, target: float) -> set[str]:
    """Names that get 8 bits, greedily in this order, at no more than `target` bits per weight of all."""
    bits = {choice.name: 8 * choice.packed[coarse].nbytes for choice in order}
    room = target * sum(choice.packed[coarse].rows * choice.packed[coarse].columns for choice in order)
    fine = set()
    for choice in order:
        more = 8 * choice.packed[FINE].nbytes - bits[choice.name]
        if sum(bits.values()) + more <= room:
            bits[choice.name] += more
            fine.add(choice.name)
    return fine


def _within_loss(
    model: PreTrainedModel, order: list[Choice], coarse: str, most: float, ids: torch.Tensor, progress: Progress
) -> set[str]:
    """The shortest head of `order` that keeps the measured loss, by bisection."""
    own = mean_nll(model, ids)

    def loss(fine: int) -> float:
        with exchanged(model, {c.name: c.packed[FINE if n < fine else coarse] for n, c in enumerate(order)}):
            return mean_nll(model, ids) - own

    if (least := loss(len(order))) > most:
        raise UserError(f"max_loss={most}: 8 bits everywhere lose {least:.4f} nats per token already.")
    low, high, steps = -1, len(order), max(1, len(order).bit_length())
    for step in range(steps):
        progress("budget", step, steps)
        if high - low <= 1:
            break
        middle = (low + high) // 2
        low, high = (low, middle) if loss(middle) <= most else (middle, high)
    progress("budget", steps, steps)
    return {choice.name for choice in order[:high]}


@torch.no_grad()
def mean_nll(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean NLL (nats per token) of `ids` `[windows, tokens]`, each window for itself."""
    losses = [F.cross_entropy(model(window[None]).logits[0, :-1].float(), window[1:]) for window in ids]
    return float(torch.stack(losses).mean())


def _choices(
    model: PreTrainedModel, settings: Quantize, modules: dict[str, nn.Module], ids: torch.Tensor, progress: Progress
) -> list[Choice]:
    statistics = {name: Statistics(whole=False) for name in modules}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: statistics[name].add(args[0].reshape(-1, args[0].shape[-1]).float())
        )
        for name, module in modules.items()
    ]
    try:
        with torch.no_grad():
            for window in ids:
                model.base_model(input_ids=window[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for number, (name, module) in enumerate(modules.items()):
        progress("candidates", number, len(modules))
        weight, packed = weight_of(module), {}
        for format in (settings.coarse, FINE):
            grid, group = GRIDS[format], settings.group_size
            if settings.method == "rtn" or not statistics[name].rows:
                packed[format] = rtn(weight, grid, group).pack()
            else:
                packed[format] = search(weight, statistics[name].mean, grid, group).pack()
        found.append(Choice(name, packed))
    progress("candidates", len(modules), len(modules))
    return found


def _measure(
    model: PreTrainedModel,
    choices: dict[str, Choice],
    modules: dict[str, nn.Module],
    ids: torch.Tensor,
    progress: Progress,
) -> None:
    """Fill in `cost` of every choice."""
    tokens = ids.numel()

    def after(name: str) -> Callable[..., None]:
        choice, weight = choices[name], weight_of(modules[name])
        choice.cost = dict.fromkeys(choice.packed, 0.0)

        def gradient_known(inputs: torch.Tensor, gradient: torch.Tensor) -> None:
            x, g = inputs.flatten(0, -2).float(), gradient.flatten(0, -2).float()
            for format, packed in choice.packed.items():
                moved = x @ (unpack(packed) - weight.float()).T
                choice.cost[format] += float((moved * g).sum(-1).square().sum()) / 2 / tokens

        def forward_done(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            inputs = args[0].detach()
            output.register_hook(lambda gradient: gradient_known(inputs, gradient))

        return forward_done

    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles = [module.register_forward_hook(after(name)) for name, module in modules.items()]
    # Gradients reach every layer, but no weight has one of its own.
    embedding = model.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda module, args, output: output.detach().requires_grad_()))
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            for number, window in enumerate(ids):
                progress("sensitivity", number, len(ids))
                logits = model(window[None], use_cache=False).logits[0, :-1].float()
                F.cross_entropy(logits, window[1:], reduction="sum").backward()
    finally:
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        for handle in handles:
            handle.remove()
    progress("sensitivity", len(ids), len(ids))
