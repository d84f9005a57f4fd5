"""Branches in a model: choosing layers, putting branches in, and taking them out."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lissom.errors import UserError
from lissom.kernels.packed import check_finite
from lissom.models.linear import KINDS, require_original
from lissom.training_plugin import mark, unmark
from lissom.weights.noble.config import NobleConfig
from lissom.weights.noble.layer import Branched, branched, initialise, plain

# Parts of names of linear layers that see no tokens, or choose experts.
_OTHER = ("norm", "adaln", "modulation", "router", "time_emb", "timestep")
_ROUTERS = ("gate", "shared_expert_gate")
_READ_ELSEWHERE = ("dt_proj",)  # of Mamba, whose code multiplies with the weight itself
logger = logging.getLogger(__name__)


def convert(model: nn.Module, settings: NobleConfig) -> nn.Module:
    """See `NobleConfig.convert`."""
    if layers_of(model):
        raise UserError("The model has branches already.")
    if hasattr(model, "peft_config"):
        raise UserError("The model has adapters: put branches in first, and adapters on top, or merge them.")
    if isinstance(model, PreTrainedModel):
        require_original(model)
    chosen = chosen_layers(model, settings)
    if settings.mode == "scratch" and (loaded := _loaded(model, chosen)):
        raise UserError(
            f"{loaded} was loaded from a checkpoint, and mode='scratch' would draw its weights again: "
            "give mode='add-on'."
        )
    _put_in(model, settings, chosen)
    for layer in layers_of(model).values():
        initialise(layer)
    mark(model, settings)
    return model


def place(model: nn.Module, settings: NobleConfig) -> None:
    """Put branches in whose tensors are still to be filled; nothing is changed where one cannot be."""
    _put_in(model, settings, chosen_layers(model, settings))


def _put_in(model: nn.Module, settings: NobleConfig, chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        in_features, out_features = _sizes(module)
        rank = settings.rank_of(in_features, out_features)
        if rank >= min(in_features, out_features):
            raise UserError(
                f"A branch of rank {rank} is no narrower than {name} ({in_features} inputs, {out_features} outputs): "
                "give a smaller rank or a ratio, or leave the layer out with exclude_modules."
            )
        if not module.weight.is_meta:
            check_finite(module.weight.detach(), name)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, module in chosen.items():
        own = name.removeprefix(prefix)  # the same with and without a head: what is drawn depends on it
        layer = branched(module, settings, own)
        for place_of in [found for found, other in model.named_modules(remove_duplicate=False) if other is module]:
            model.set_submodule(place_of, layer)
    if isinstance(model, PreTrainedModel):  # `from_pretrained(dtype=...)` asks for this
        kept = set(model._keep_in_fp32_modules_strict or ())
        model._keep_in_fp32_modules_strict = kept | {r"\.noble\.omega_\d", r"\.noble\.phi_\d"}


def chosen_layers(model: nn.Module, settings: NobleConfig) -> dict[str, nn.Module]:
    """The linear layers that `settings` names, by their names in `model`.

    Raises:
        UserError: there are none, or a pattern fits none.
    """
    if type(model) in KINDS:
        raise UserError("The model is a linear layer itself: put it into a module.")
    linear = {
        name: module
        for name, module in model.named_modules()
        if type(module) in KINDS and not _is_read_elsewhere(model, name)
    }
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if settings.target_modules is None:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        found = {name: module for name, module in linear.items() if _in_block(model, name) and module is not head}
    else:
        found = {}
        for pattern in settings.target_modules:
            whole = [name for name in (pattern, pattern.removeprefix(prefix)) if name in linear]
            names = whole or [name for name in linear if _fits(name, pattern, prefix)]
            fitting = {name: linear[name] for name in names}
            if not fitting:
                raise UserError(
                    f"target_modules: no linear layer is called {pattern!r}; there are {_some(linear)}."
                    + _of_other_classes(model)
                )
            found |= fitting
    if not found:
        known = f"; there are {_some(linear)}" if linear else ""
        raise UserError(
            f"{type(model).__name__} has no linear layers that get a branch{known}.{_of_other_classes(model)}"
        )
    kept = {
        name: module
        for name, module in found.items()
        if not any(_fits(name, pattern, prefix) for pattern in settings.exclude_modules)
    }
    if not kept:
        raise UserError(f"exclude_modules leaves no linear layer: all of {_some(found)} are excluded.")
    if any(parameter.ndim == 3 and "expert" in name for name, parameter in model.named_parameters()):
        logger.warning("Experts whose weights lie in one tensor get no branches.")
    return dict(sorted(kept.items()))


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers with branches, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Branched)}


def prune(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Take the branches of the layers `names` out, in place: what they added is gone, and so is what they cost.

    Returns:
        `model`; `save_pretrained` writes which layers are left with a branch.

    Raises:
        UserError: a layer has none.
    """
    layers, gone = layers_of(model), list(names)
    for name in gone:
        if name not in layers:
            raise UserError(f"{name} has no branch to take out; there are {_some(layers)}.")
    if not gone:
        return model
    settings: NobleConfig = layers[gone[0]].noble.settings
    for name in gone:
        model.set_submodule(name, plain(layers[name]))
    left = tuple(name for name in layers if name not in gone)
    if left:
        mark(model, replace(settings, target_modules=left, exclude_modules=()))
    else:
        unmark(model)
    return model


def _loaded(model: nn.Module, layers: dict[str, nn.Module]) -> str:
    """The name of a layer whose weight came from a checkpoint, if any: transformers marks such weights, and models of
    diffusers know where they came from."""
    if getattr(getattr(model, "config", None), "_name_or_path", None) and not isinstance(model, PreTrainedModel):
        return type(model).__name__
    marked = (name for name, module in layers.items() if getattr(module.weight, "_is_hf_initialized", False))
    return next(marked, "")


def _sizes(module: nn.Module) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _is_read_elsewhere(model: nn.Module, name: str) -> bool:
    """Whether other code multiplies with the layer's weight, past whatever the layer does."""
    parent, _, own = name.rpartition(".")
    return own in _READ_ELSEWHERE or isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer)


def _in_block(model: nn.Module, name: str) -> bool:
    """Whether a linear layer is part of a block that is repeated, and sees tokens."""
    parts = name.split(".")
    if parts[-1] in _ROUTERS or any(word in part.lower() for part in parts for word in _OTHER):
        return False
    above = (".".join(parts[:depth]) for depth in range(len(parts)))
    return any(isinstance(model.get_submodule(parent), nn.ModuleList) for parent in above)


def _fits(name: str, pattern: str, prefix: str) -> bool:
    """Whether a pattern is a layer's name or its end; names may be those of the same model with a head."""
    return any(fnmatchcase(full, form) for full in (name, prefix + name) for form in (pattern, f"*.{pattern}"))


def _of_other_classes(model: nn.Module) -> str:
    """A sentence about linear layers that may do something of their own, as Falcon's."""
    others = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear) and type(m) not in KINDS})
    return f" Layers of other classes than nn.Linear ({', '.join(others)}) get none." if others else ""


def _some(names: Iterable[str]) -> str:
    """Some of the names, each kind once."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    return ", ".join(kinds[:12]) or "none"
