"""What calls of models say."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch


def argument(module: torch.nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a forward call gives for `name`, by keyword or by place; None where it gives nothing."""
    if name in kwargs:
        return kwargs[name]
    places = list(inspect.signature(module.forward).parameters)
    return args[places.index(name)] if name in places and places.index(name) < len(args) else None
