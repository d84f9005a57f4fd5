"""What Sparse-BitNet does and measures while a model is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from lissom.training_plugin import mark
from lissom.weights.sparse_bitnet.apply import census, layers_of, set_sparse
from lissom.weights.sparse_bitnet.config import SparseBitNetConfig

_ROUNDING = 1e-9  # of shares of steps
Masks = dict[str, torch.Tensor]


class SparseTraining:
    """See `lissom.models.method.Training`."""

    def __init__(self, model: PreTrainedModel, settings: SparseBitNetConfig) -> None:
        self.model, self.settings = model, settings
        self._masks: Masks | None = None  # as they were when they were last looked at; None where they are off

    def begin_step(self, done: float) -> None:
        """Masks are on in the last share of the steps that `sparse_share` says, and in the last one at least. From then
        on the model is a sparse one, which training that follows leaves so."""
        sparse = done > 1 - self.settings.sparse_share + _ROUNDING
        set_sparse(self.model, sparse)
        if sparse and self._masks is None:
            self._masks = self._frozen()[1]
            if self.settings.sparse_share < 1:
                mark(self.model, replace(self.settings, sparse_share=1.0))

    def parameter_groups(self, model: nn.Module, learning_rate: float, weight_decay: float) -> None:
        """Those that any model has."""

    def measures(self) -> dict[str, float]:
        """`zeros`, `pruned` and `empty` of the `Census`; and `mask_flips`, the share of places that masks have changed
        in since the last time."""
        frozen, masks = self._frozen()
        values = asdict(census(self.model, frozen)) if self.settings.quantize else {}
        if self._masks is not None and self.settings.n < self.settings.m:
            flipped = sum(int((mask != self._masks[name]).sum()) for name, mask in masks.items())
            values["mask_flips"] = flipped / sum(mask.numel() for mask in masks.values())
            self._masks = masks
        return values

    def _frozen(self) -> tuple[Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], Masks]:
        """What each layer stands for now, and the masks alone."""
        frozen = {name: layer.frozen() for name, layer in layers_of(self.model).items()}
        return frozen, {name: mask for name, (_, mask, _) in frozen.items()}
