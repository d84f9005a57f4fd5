"""What NOBLE asks of a trainer: a learning rate of its own for each kind of tensor."""

from __future__ import annotations

from typing import Any

from torch import nn

from lissom.models.parameter_groups import parameter_groups
from lissom.weights.noble.apply import layers_of
from lissom.weights.noble.config import NobleConfig
from lissom.weights.noble.diagnostics import omega_drift
from lissom.weights.noble.layer import Branch, kind_of


def noble_parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups of the parameters of `model` for any optimiser: `AdamW(noble_parameter_groups(model, 3e-4, 0.1))`.

    Branches' tensors have the base rate times the factors of their preset. Frequencies and phases do not decay, which
    would make a constant of a branch; nor do biases and norms. As everywhere in AdamW, decay is the group's rate times
    `weight_decay`. The model may be wrapped (DDP, FSDP2, `torch.compile`).
    """
    factors: dict[int, float] = {}
    undecayed = set()
    for branch in (module for module in model.modules() if isinstance(module, Branch)):
        for own, factor in branch.factors().items():
            parameter = getattr(branch, own)
            factors[id(parameter)] = factor
            if kind_of(own) in ("omega", "phi"):
                undecayed.add(id(parameter))
    return parameter_groups(model, learning_rate, weight_decay, factors, frozenset(undecayed))


class NobleTraining:
    """See `lissom.models.method.Training`."""

    def __init__(self, model: nn.Module, settings: NobleConfig) -> None:
        self.model = model

    def begin_step(self, done: float) -> None:
        """Nothing depends on the step."""

    def parameter_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `noble_parameter_groups`."""
        return noble_parameter_groups(model, learning_rate, weight_decay)

    def measures(self) -> dict[str, float]:
        """`omega_drift`: mean distance of frequencies from where they began."""
        drifts = [omega_drift(layer) for layer in layers_of(self.model).values()]
        return {"omega_drift": sum(drifts) / len(drifts)} if drifts else {}
