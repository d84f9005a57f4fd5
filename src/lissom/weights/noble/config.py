"""Settings of NOBLE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lissom.errors import UserError
from lissom.models.method import Training, check_types, described
from lissom.weights.noble.activation import Kind
from lissom.weights.noble.preset import PRESETS, Preset

if TYPE_CHECKING:
    from torch import nn

_RANK = 64  # the paper's smallest


@dataclass(frozen=True)
class NobleConfig:
    """Nonlinear low-rank branches beside linear layers: `y = x W + b + act(x W_down) W_up`, trained with the rest of
    the model and kept when it runs.

    Attributes:
        rank: width of the branches (paper: 64 to 256); 64 where there is no `ratio` either. It must be below both sides
            of every layer.
        ratio: instead of `rank`: the width is this share of a layer's smaller side, at least 1.
        activation: `cosnet` (the paper's best), or another of the paper's search: `identity` (a linear branch),
            `cosine` (one), `three-cosine`, and `gelu-net`, `silu-net`, `tanh-net` (function, matrix, function).
        preset: where the sources conflict. `paper`: what two re-implementations that cite the paper agree on;
            `repo`: the published code. They differ in learning rates, in how the inner matrix begins, and in biases.
        target_modules: names of linear layers, or their ends (`q_proj`), with `*` for anything; a whole name means that
            layer alone. None: all linear layers of the model's blocks but routers and modulations.
        exclude_modules: likewise, of layers that stay plain.
        mode: `scratch` (paper): for a new model, whose main weights are drawn again, half as large. `add-on`
            (extension): for a trained one, whose weights stay; branches are centred.
        centred: whether a branch gives 0 for an input of 0, by subtracting what it gives there (extension; None: in
            `add-on`). Otherwise nearly all that a new branch gives is a constant.
        up_scale: standard deviation of W_up times sqrt(rank). 0 (extension) leaves the model exactly as it is, but
            then nothing else of the branch learns in the first step.
        two_sided: spread the learning rate's factor over W_down and W_up (an option of the published code).
        seed: of all that is drawn; a layer's values depend on it and on its name alone.

    Raises:
        UserError: a value is out of range.
    """

    name: ClassVar[str] = "noble"
    only_fp32: ClassVar[bool] = False

    rank: int | None = None
    ratio: float | None = None
    activation: Kind = "cosnet"
    preset: Literal["paper", "repo"] = "paper"
    target_modules: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] = ()
    mode: Literal["scratch", "add-on"] = "scratch"
    centred: bool | None = None
    up_scale: float = 0.01
    two_sided: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("target_modules", "exclude_modules"):  # config.json and recipes have lists
            given = getattr(self, field)
            if isinstance(given, list | str):
                object.__setattr__(self, field, (given,) if isinstance(given, str) else tuple(given))
        check_types(self)
        if self.rank is None and self.ratio is None:
            object.__setattr__(self, "rank", _RANK)
        if self.rank is not None and self.ratio is not None:
            raise UserError(f"rank={self.rank} and ratio={self.ratio}: expected one of them.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank={self.rank}: expected at least 1.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(f"ratio={self.ratio}: expected a share above 0 and below 1.")
        if not (math.isfinite(self.up_scale) and self.up_scale >= 0):
            raise UserError(f"up_scale={self.up_scale}: expected a number from 0.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: expected a number from 0 to below 2^32.")

    @property
    def source(self) -> Preset:
        """What `preset` stands for."""
        return PRESETS[self.preset]

    @property
    def subtracts(self) -> bool:
        """Whether branches are centred."""
        return self.mode == "add-on" if self.centred is None else self.centred

    def rank_of(self, in_features: int, out_features: int) -> int:
        """Width of the branch of a layer."""
        if self.ratio is not None:
            return max(1, round(self.ratio * min(in_features, out_features)))
        assert self.rank is not None
        return self.rank

    def convert(self, model: nn.Module) -> nn.Module:
        """Put branches beside the linear layers of `model`, a model of transformers or of diffusers or any module.

        Returns:
            `model`, changed in place. Layers keep their weights under their names. `save_pretrained` writes the
            branches too, and `from_pretrained` makes them again.

        Raises:
            UserError: a layer is too small for the rank, no layer has such a name, weights are not finite or quantised,
                the model has branches already, or it has been trained and `mode` would draw its weights again.
        """
        from lissom.weights.noble.apply import convert

        return convert(model, self)

    def place(self, model: nn.Module) -> None:
        """Put in branches whose tensors are still to be loaded."""
        from lissom.weights.noble.apply import place

        place(model, self)

    def complete(self, model: nn.Module) -> None:
        """Draw branches that a checkpoint did not have."""
        from lissom.weights.noble.apply import layers_of

        for layer in layers_of(model).values():
            layer.noble.initialise(only_missing=True)

    def training(self, model: nn.Module) -> Training:
        """What the trainer is to do and to log while a converted model is trained."""
        from lissom.weights.noble.training import NobleTraining

        return NobleTraining(model, self)

    def __str__(self) -> str:
        width = f"rank {self.rank}" if self.ratio is None else f"ratio {self.ratio:g}"
        return described(self, f"noble {self.activation} {width}", "rank", "ratio", "activation")
