"""What Sparse-BitNet does and measures while a model is trained."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import nn

from lissom.weights.sparse_bitnet.apply import census, layers_of, set_sparse
from lissom.weights.sparse_bitnet.config import SparseBitNetConfig

_ROUNDING = 1e-9  # of shares of steps


class SparseTraining:
    """See `lissom.models.method.Training`."""

    def __init__(self, model: nn.Module, settings: SparseBitNetConfig) -> None:
        self.model, self.settings = model, settings
        self._masks: dict[str, torch.Tensor] = {}

    def begin_step(self, done: float) -> None:
        """Masks are on in the last share of the steps that `sparse_share` says, and in the last one at least."""
        set_sparse(self.model, done > 1 - self.settings.sparse_share + _ROUNDING)

    def measures(self) -> dict[str, float]:
        """`zeros`, `pruned` and `empty` of the `Census`; and `mask_flips`, the share of places that masks have changed
        in since the last time."""
        layers = layers_of(self.model)
        frozen = {name: layer.frozen() for name, layer in layers.items()}
        values = asdict(census(self.model, frozen)) if self.settings.quantize else {}
        masks = {name: frozen[name][1] for name, layer in layers.items() if layer.sparse}
        if masks and masks.keys() == self._masks.keys():
            flipped = sum(int((mask != self._masks[name]).sum()) for name, mask in masks.items())
            values["mask_flips"] = flipped / sum(mask.numel() for mask in masks.values())
        self._masks = masks
        return values
