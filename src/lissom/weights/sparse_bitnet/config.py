"""Settings of Sparse-BitNet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lissom.errors import UserError
from lissom.models.method import Training, check_types, described
from lissom.weights.sparse_bitnet.ternary import MaskFrom, ScaleFrom, check_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SparseBitNetConfig:
    """Ternary weights with dynamic N:M sparsity, and 8-bit activations, in every linear layer of a decoder.

    `convert` puts layers in place that are to be trained; `pack` stores what they have become. Defaults are the
    paper's, but for the pattern: its models are 6:8, which saves next to no memory, while 2:4 has fast kernels here.

    Attributes:
        n, m: of `m` consecutive inputs at most `n` have a weight. n = m is a dense ternary model (BitNet b1.58).
        quantize: False is the paper's control: the same masks on floating point weights and activations.
        mask_from: `master` (paper), or for the ablation `ternary`.
        scale_from: `dense` (paper), or for the ablations `masked` and `survivors`; see `ternary.scale_of`.
        gradient: `dense` (paper): weights that are left out get theirs too, and can come back. `masked`: ablation.
        sparse_share: last share of the training steps that is sparse: 1 (paper) is all of them, 0.25 a dense-to-sparse
            schedule. It is the trainer that turns masks on; a model that has come so far says 1 of itself.

    Raises:
        UserError: a value is out of range.
    """

    name: ClassVar[str] = "sparse-bitnet"
    only_fp32: ClassVar[bool] = True

    n: int = 2
    m: int = 4
    quantize: bool = True
    mask_from: MaskFrom = "master"
    scale_from: ScaleFrom = "dense"
    gradient: Literal["dense", "masked"] = "dense"
    sparse_share: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        check_pattern(self.n, self.m)
        if not 0 < self.sparse_share <= 1:
            raise UserError(f"sparse_share={self.sparse_share}: expected a share above 0, up to 1.")
        if not self.quantize and (self.mask_from, self.scale_from) != ("master", "dense"):
            raise UserError("mask_from and scale_from are about ternary weights: leave them with quantize=False.")

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        """Put trainable sparse ternary layers in the place of the decoder's linear layers. They share the weights,
        which become fp32; embedding, head and norms stay.

        Without training behind it this is one-shot ternarisation, which ruins a model.

        Returns:
            `model`, changed in place. `save_pretrained` writes the master weights, and `from_pretrained` makes these
            layers again.

        Raises:
            UserError: a layer's inputs do not divide by `m`, weights are not finite, or the model is quantised.
        """
        from lissom.weights.sparse_bitnet.apply import convert

        return convert(model, self)

    def place(self, model: PreTrainedModel) -> None:
        """Exchange the layers of a model whose weights are still to be loaded."""
        from lissom.weights.sparse_bitnet.apply import place

        place(model, self)

    def complete(self, model: PreTrainedModel) -> None:
        """There is nothing but the weights of plain layers."""

    def check_packable(self, model: PreTrainedModel) -> None:
        """See `lissom.weights.sparse_bitnet.apply.check_packable`."""
        from lissom.weights.sparse_bitnet.apply import check_packable

        check_packable(model)

    def pack(self, model: PreTrainedModel) -> PreTrainedModel:
        """See `lissom.weights.sparse_bitnet.pack`."""
        from lissom.weights.sparse_bitnet.apply import pack

        return pack(model)

    def training(self, model: PreTrainedModel) -> Training:
        """What the trainer is to do and to log while a converted model is trained."""
        from lissom.weights.sparse_bitnet.training import SparseTraining

        return SparseTraining(model, self)

    def __str__(self) -> str:
        words = f"sparse-bitnet {self.n}:{self.m}" if self.quantize else f"sparse {self.n}:{self.m}"
        return described(self, words, "n", "m", "quantize")
