"""Checkpoints of models in training: plain weights, and in config.json which method they are trained for.

`mark(model, method)` is all that is needed by a method that has put layers of its own into a model. The module is
imported while transformers itself is being imported, so it takes the rest of lissom only where it is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from lissom.models.method import Trainable

NAME = "lissom_training"
_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Host:
    """A library beside transformers that saves and loads models: `made` says whether one is of it."""

    made: Callable[[nn.Module], bool]
    mark: Callable[[Any, Trainable], None]
    unmark: Callable[[Any], None]


OTHER_HOSTS: list[Host] = []  # those that have been imported


class TrainingConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Attributes:
        method: key of the method.
        settings: of it.
        version: of what they mean.

    Raises:
        UserError: it was written by another version of lissom, or it is damaged.
    """

    def __init__(
        self, method: str = "", settings: dict[str, Any] | None = None, version: int = _VERSION, **unknown: Any
    ) -> None:
        from lissom.errors import UserError

        self.quant_method = NAME
        self.method, self.settings, self.version = method, dict(settings or {}), version
        if version != _VERSION:
            raise UserError(f"The checkpoint is in training by version {version}; this lissom reads {_VERSION}.")
        self.build()

    def build(self) -> Trainable:
        """The method with its settings."""
        from lissom.errors import UserError
        from lissom.models.method import Trainable
        from lissom.models.registry import build

        try:
            method = build(self.method, self.settings)
        except UserError as error:
            raise UserError(f"config.json is damaged, or of another lissom: {error}") from error
        if not isinstance(method, Trainable):
            raise UserError(f"config.json is damaged: {self.method} is not trained.")
        return method


class TrainingQuantizer(HfQuantizer):
    """Puts trainable layers in the place of plain ones, for transformers to load master weights into."""

    requires_calibration = False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Master weights are fp32 where the method asks for it: in 16 bits most updates round to nothing."""
        if not self.quantization_config.build().only_fp32:
            return dtype
        if dtype != torch.float32:
            logger.warning("The model is loaded in fp32 and not in %s: its weights are those that are trained.", dtype)
        return torch.float32

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.quantization_config.build().place(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.quantization_config.build().complete(model)

    def is_serializable(self) -> bool:
        """See `HfQuantizer`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """See `HfQuantizer`."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The weights themselves are what is trained."""
        return True


def mark(model: nn.Module, method: Trainable) -> None:
    """Let transformers or diffusers know that `model` has the method's trainable layers: `from_pretrained` makes them
    again. A module of neither has no checkpoints of its own."""
    for host in OTHER_HOSTS:
        if host.made(model):
            host.mark(model, method)
    if not hasattr(model, "get_input_embeddings"):
        return
    from lissom.plugin import adopt  # here: it may be in the middle of importing transformers

    adopt(model, TrainingQuantizer(TrainingConfig(method.name, asdict(method))))  # type: ignore[call-overload]


def unmark(model: nn.Module) -> None:
    """The model has no such layers any more: it is saved as the plain model that it is."""
    for host in OTHER_HOSTS:
        if host.made(model):
            host.unmark(model)
    if method_in_training(model) is None:
        return
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized, model.quantization_method = False, None


def method_in_training(model: nn.Module) -> Trainable | None:
    """The method that `model` is in training with, if any."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config.build() if isinstance(config, TrainingConfig) else None


def _register() -> None:
    from transformers.quantizers import auto  # here: transformers may be in the middle of importing it

    if NAME not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(NAME)(TrainingConfig)
        auto.register_quantizer(NAME)(TrainingQuantizer)


_register()
