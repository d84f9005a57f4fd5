"""Settings of the quantiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from lissom.errors import UserError
from lissom.kernels.packed import GROUP
from lissom.models.method import SearchContext, described

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rounding = Literal["rtn", "search", "gptq"]
_ROUNDINGS = ("rtn", "search", "gptq")
FINE = "q8"


@dataclass(frozen=True)
class Quantize:
    """Low-bit weights: every linear layer's matrix is stored in codes of 4 or 8 bits with a scale per group.

    Attributes:
        bits: 4 or 8, of the matrices in the decoder's layers.
        method: how codes are found: `rtn` rounds to nearest, `search` looks for the scale with the least error weighted
            by the mean square of each input, `gptq` lets later columns make up for the error of earlier ones.
        group_size: inputs that share a scale, a multiple of 32.
        symmetric: 4-bit groups have a scale only (half a bit per weight less at 32), otherwise a minimum too. 8 bits
            are always symmetric.
        head_bits: of the embedding and the output head: 4, 8, or 16, which leaves them as they are.
        target_bits: 4-bit matrices become 8-bit ones, the most sensitive per byte first, as long as the layers'
            matrices take at most so many bits per weight, scales included.
        max_loss: as `target_bits`, until the mean NLL on the calibration text is at most this above the model's own.
        calibration: text file; None is a built-in text. `rtn` without a budget needs none.
        calibration_tokens: taken of it.
        damping: of GPTQ, share of the Hessian's mean diagonal (paper: 0.01).
        act_order: of GPTQ, columns with large inputs first.
        shrinkage: of GPTQ, share that is taken off all of the Hessian but its diagonal, 0 to 1 (paper: 0). An
            extension: of a short text, how two inputs go together is known less well than how large each is.
    """

    name: ClassVar[str] = "quantize"

    bits: int = 4
    method: Rounding = "gptq"
    group_size: int = 32
    symmetric: bool = False
    head_bits: int = 8
    target_bits: float | None = None
    max_loss: float | None = None
    calibration: str | None = None
    calibration_tokens: int = 8192
    damping: float = 0.01
    act_order: bool = True
    shrinkage: float = 0.5

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(f"bits={self.bits}: expected 4 or 8.")
        if self.method not in _ROUNDINGS:
            raise UserError(f"method={self.method!r}: expected one of {', '.join(_ROUNDINGS)}.")
        if not isinstance(self.group_size, int) or self.group_size < GROUP or self.group_size % GROUP:
            raise UserError(f"group_size={self.group_size}: expected a multiple of {GROUP}.")
        if self.head_bits not in (4, 8, 16):
            raise UserError(f"head_bits={self.head_bits}: expected 4, 8 or 16 (as it is).")
        if self.mixed and self.bits != 4:
            raise UserError("target_bits and max_loss choose between 4 and 8 bits: leave bits at 4.")
        if self.target_bits is not None and self.max_loss is not None:
            raise UserError("Give either target_bits or max_loss, not both.")
        if self.target_bits is not None and not self.target_bits >= self.least_bits:
            raise UserError(
                f"target_bits={self.target_bits}: with scales, 4 bits in groups of {self.group_size} take "
                f"{self.least_bits:g}; give at least that, a larger group or symmetric=true."
            )
        if self.max_loss is not None and not self.max_loss > 0:
            raise UserError(f"max_loss={self.max_loss}: expected a number above 0 (nats per token).")
        if self.calibration_tokens < 512:
            raise UserError(f"calibration_tokens={self.calibration_tokens}: expected at least 512.")
        if not 0 < self.damping < 1:
            raise UserError(f"damping={self.damping}: expected a share between 0 and 1.")
        if not 0 <= self.shrinkage <= 1:
            raise UserError(f"shrinkage={self.shrinkage}: expected a share from 0 to 1.")

    @property
    def mixed(self) -> bool:
        """Whether a budget decides which matrices have 4 and which 8 bits."""
        return self.target_bits is not None or self.max_loss is not None

    @property
    def coarse(self) -> str:
        """The packed format of 4 bits."""
        return "q4" if self.symmetric else "q4_min"

    @property
    def least_bits(self) -> float:
        """Bits per weight at 4 bits with scales and minima."""
        return 4 + (16 if self.symmetric else 32) / self.group_size

    @property
    def format(self) -> str:
        """The packed format of the layers' matrices where no budget decides."""
        return FINE if self.bits == 8 else self.coarse

    @property
    def needs_text(self) -> bool:
        """Whether a calibration text is read."""
        return self.method != "rtn" or self.mixed

    def convert(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> PreTrainedModel:
        """Quantise `model` in place and return it; `save_pretrained` and `from_pretrained` keep it.

        Args:
            tokenizer: of the calibration text; None takes the one that lies where the model came from.
            progress: called with (stage, done, total).

        Raises:
            UserError: the model has weights that are not finite or is quantised already, or the text does not do.
        """
        from lissom.weights.quant.apply import quantize

        return quantize(model, self, tokenizer, progress)

    @classmethod
    def candidates(cls, context: SearchContext) -> list[Self]:
        """See `lissom.models.method.Method`. Only what makes the checkpoint clearly smaller."""
        four = [cls(bits=4, method="search")] if context.quick else [cls(bits=4, method="search"), cls(bits=4)]
        return [
            *([cls(bits=8, method="rtn")] if context.weight_bits > 12 else []),
            *(four if context.weight_bits > 8 else []),
        ]

    def __str__(self) -> str:
        words = f"{self.bits}-bit {self.method}" if not self.mixed else f"4/8-bit {self.method}"
        return described(self, words, "bits", "method")
