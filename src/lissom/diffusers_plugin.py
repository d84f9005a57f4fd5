"""Checkpoints of diffusers' models in training, as `lissom.training_plugin` has those of transformers'.

The module is imported while diffusers itself is being imported, so it takes the rest of lissom only where it is called.
"""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from lissom.training_plugin import NAME, OTHER_HOSTS, Host, TrainingConfig

if TYPE_CHECKING:
    from lissom.models.method import Trainable


class _Name(StrEnum):  # diffusers asks for `.value`
    TRAINING = NAME


class DiffusersTrainingConfig(TrainingConfig):
    """`quantization_config` of config.json."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.quant_method = _Name.TRAINING


class DiffusersTrainingQuantizer(DiffusersQuantizer):
    """Puts trainable layers in the place of plain ones, for diffusers to load weights into."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        config.build().place(model)
        wanted = {name.rpartition(".")[2] for name, p in model.named_parameters() if getattr(p, "keeps_fp32", False)}
        kwargs.get("keep_in_fp32_modules", []).extend(sorted(wanted))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:  # the file did not have it
                    setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
                else:
                    parameter._is_hf_initialized = True
        config: Any = self.quantization_config
        config.build().complete(model)

    @property
    def is_serializable(self) -> bool:
        """See `DiffusersQuantizer`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """See `DiffusersQuantizer`."""
        return True

    @property
    def is_compileable(self) -> bool:
        """See `DiffusersQuantizer`."""
        return True


def _made(model: nn.Module) -> bool:
    from diffusers import ModelMixin  # here: diffusers may be in the middle of importing it

    return isinstance(model, ModelMixin)


def _mark(model: Any, method: Trainable) -> None:
    config = DiffusersTrainingConfig(method.name, asdict(method))  # type: ignore[call-overload]
    model.register_to_config(quantization_config=config)
    model.hf_quantizer = DiffusersTrainingQuantizer(config)


def _unmark(model: Any) -> None:
    left = {name: value for name, value in model.config.items() if name != "quantization_config"}
    model._internal_dict = FrozenDict(left)
    del model.hf_quantizer


def _register() -> None:
    from diffusers.quantizers import auto  # here: diffusers may be in the middle of importing it

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(NAME, DiffusersTrainingConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(NAME, DiffusersTrainingQuantizer)
    OTHER_HOSTS.append(Host(_made, _mark, _unmark))


_register()
