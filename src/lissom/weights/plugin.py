"""Checkpoints of models in training with Sparse-BitNet: plain weights, and in config.json what they are trained for.

`mark(model, settings)` is all that is needed by whatever has put the layers in. The module is imported while
transformers itself is being imported, so it takes the rest of lissom only where it is called.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from lissom.weights.sparse_bitnet.config import SparseBitNetConfig

NAME = "sparse_bitnet"
_VERSION = 1
logger = logging.getLogger(__name__)


class TrainingConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Attributes:
        settings: of `SparseBitNetConfig`.
        version: of what they mean.

    Raises:
        UserError: it was written by another version of lissom, or it is damaged.
    """

    def __init__(self, settings: dict[str, Any] | None = None, version: int = _VERSION, **unknown: Any) -> None:
        from lissom.errors import UserError

        self.quant_method = NAME
        self.settings, self.version = dict(settings or {}), version
        if version != _VERSION:
            raise UserError(f"The checkpoint is of Sparse-BitNet version {version}; this lissom reads {_VERSION}.")
        self.method()

    def method(self) -> SparseBitNetConfig:
        """The settings as they are used."""
        from lissom.errors import UserError
        from lissom.weights.sparse_bitnet.config import SparseBitNetConfig

        try:
            return SparseBitNetConfig(**self.settings)
        except TypeError as error:
            raise UserError(f"config.json is damaged: {self.settings} are no settings of Sparse-BitNet.") from error


class TrainingQuantizer(HfQuantizer):
    """Puts trainable layers in the place of plain ones, for transformers to load master weights into."""

    requires_calibration = False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Master weights are fp32: in 16 bits most updates round to nothing."""
        if dtype != torch.float32:
            logger.warning("The model is loaded in fp32 and not in %s: its weights are those that are trained.", dtype)
        return torch.float32

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from lissom.weights.sparse_bitnet.apply import place

        place(model, self.quantization_config.method())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pass

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


def mark(model: nn.Module, settings: SparseBitNetConfig) -> None:
    """Let transformers know that `model` has trainable sparse ternary layers: `from_pretrained` makes them again."""
    model.config.quantization_config = TrainingConfig(asdict(settings))
    model.hf_quantizer = TrainingQuantizer(model.config.quantization_config)
    model.is_quantized, model.quantization_method = True, NAME


def _register() -> None:
    from transformers.quantizers import auto  # here: transformers may be in the middle of importing it

    if NAME not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(NAME)(TrainingConfig)
        auto.register_quantizer(NAME)(TrainingQuantizer)


_register()
