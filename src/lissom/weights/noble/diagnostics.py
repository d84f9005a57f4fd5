"""What branches do in a trained model, and which of them it could do without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lissom.errors import UserError
from lissom.weights.noble.apply import layers_of
from lissom.weights.noble.layer import kind_of


@dataclass(frozen=True)
class BranchReport:
    """One layer's branch, over all tokens of the text that was measured on.

    Attributes:
        energy: mean square of what the branch adds over that of the main path, without its bias.
        dc_share: share of the branch's mean square that is the square of its mean over tokens: 1 is a constant, which a
            bias could be.
        omega_drift: mean distance of its frequencies from where they began; 0 without cosines.
        utility: how much the loss rises without the branch, in the loss's unit; None where it was not measured.
    """

    energy: float
    dc_share: float
    omega_drift: float
    utility: float | None = None


class _Moments:
    """Sums over tokens of one layer's outputs."""

    def __init__(self) -> None:
        self.tokens = 0
        self.main = self.branch = 0.0
        self.total: torch.Tensor | float = 0.0

    @torch.no_grad()
    def __call__(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        added = layer.branch(inputs[0]).double().flatten(0, -2)
        main = output.double().flatten(0, -2) - added
        if layer.bias is not None:
            main = main - layer.bias.double()
        self.tokens += len(added)
        self.main += float(main.square().sum())
        self.branch += float(added.square().sum())
        self.total = self.total + added.sum(0)

    @property
    def dc(self) -> float:
        """Energy of the mean."""
        assert isinstance(self.total, torch.Tensor)
        return float((self.total / self.tokens).square().sum()) * self.tokens


@torch.no_grad()
def report(
    model: nn.Module,
    inputs: Iterable[dict[str, Any]],
    loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, BranchReport]:
    """What each branch of `model` does, by layer.

    Args:
        inputs: keywords of the model, some batches.
        loss: of a model and one of `inputs`, a number; with it each branch's `utility` is measured, which takes a pass
            over all inputs for each layer. `lambda model, batch: model(**batch).loss` where inputs have labels.
        progress: called with (layers whose utility is known, layers).

    Raises:
        UserError: the model has no branches, or there are no inputs.
    """
    layers, batches = layers_of(model), list(inputs)
    if not layers:
        raise UserError("The model has no branches: `NobleConfig(...).convert(model)` puts them in.")
    if not batches:
        raise UserError("Expected at least one batch of inputs to measure on.")
    moments = {name: _Moments() for name in layers}
    hooks = [layer.register_forward_hook(moments[name]) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
        for hook in hooks:
            hook.remove()
        utilities = {} if loss is None else _utilities(model, layers, batches, loss, progress)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return {
        name: BranchReport(
            moments[name].branch / moments[name].main if moments[name].main else float("inf"),
            moments[name].dc / moments[name].branch if moments[name].branch else 0.0,
            omega_drift(layer),
            utilities.get(name),
        )
        for name, layer in layers.items()
        if moments[name].tokens
    }


def omega_drift(layer: Any) -> float:
    """Mean distance of a layer's frequencies from where they began."""
    branch = layer.noble
    drifts = [
        (_whole(parameter).float().cpu() - branch.initial(own)).abs().mean()
        for own, parameter in branch.named_parameters()
        if kind_of(own) == "omega"
    ]
    return float(torch.stack(drifts).mean()) if drifts else 0.0


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """All of it, where it is spread over processes."""
    detached = parameter.detach()
    full: torch.Tensor = detached.full_tensor() if hasattr(detached, "full_tensor") else detached
    return full


def _utilities(
    model: nn.Module,
    layers: dict[str, Any],
    batches: list[dict[str, Any]],
    loss: Callable[[nn.Module, dict[str, Any]], torch.Tensor],
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    def mean() -> float:
        return sum(float(loss(model, batch)) for batch in batches) / len(batches)

    whole, found = mean(), {}
    for number, (name, layer) in enumerate(layers.items(), 1):
        with _silent(layer):
            found[name] = mean() - whole
        progress(number, len(layers))
    return found


@contextmanager
def _silent(layer: Any) -> Iterator[None]:
    """The layer as if it had no branch."""
    up = layer.noble.up.data
    layer.noble.up.data = torch.zeros_like(up)
    try:
        yield
    finally:
        layer.noble.up.data = up


def useless(reports: dict[str, BranchReport], least: float = 0.0) -> list[str]:
    """The layers whose branch, taken out alone, raises the loss by no more than `least`: names for `prune`.

    Utilities do not add up: measure again behind taking out many.

    Raises:
        UserError: utilities were not measured.
    """
    if any(own.utility is None for own in reports.values()):
        raise UserError("Utilities were not measured: give `report` a loss.")
    return [name for name, own in reports.items() if own.utility is not None and own.utility <= least]
