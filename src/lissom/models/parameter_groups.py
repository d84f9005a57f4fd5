"""Parameters in groups for an optimiser, by what the learning rate is multiplied by and whether weights decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

_UNDECAYED = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")  # as transformers has it


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    factors: Mapping[int, float],
    undecayed: frozenset[int] = frozenset(),
) -> list[dict[str, Any]]:
    """One group for each factor, of parameters that decay and of others: schedulers scale the rate of each group, and
    optimisers save them in this order. The first group is that of the base rate.

    Args:
        factors: of the learning rate, by `id` of the parameter; 1 where nothing is said.
        undecayed: `id`s of parameters without weight decay, beside biases and norms.
    """
    decayed = set(get_parameter_names(model, [nn.LayerNorm], list(_UNDECAYED)))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name in decayed and id(parameter) not in undecayed
            groups.setdefault((factors.get(id(parameter), 1.0), decays), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] != 1, key[0], not key[1]))
    return [
        {"params": groups[factor, decays], "lr": learning_rate * factor, "weight_decay": weight_decay * decays}
        for factor, decays in order
    ]
