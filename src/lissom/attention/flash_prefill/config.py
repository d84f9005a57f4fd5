"""Settings of `flash-prefill`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.attention.flash_prefill import controls
from lissom.attention.flash_prefill.apply import applied
from lissom.attention.flash_prefill.calibrate import Each, calibrated
from lissom.attention.flash_prefill.crossover import first_sparse
from lissom.attention.flash_prefill.prefill import Precision, Select
from lissom.attention.flash_prefill.report import Report
from lissom.errors import UserError
from lissom.kernels.blocks import Rules
from lissom.models.method import SearchContext, check_types, described

Selection = Literal["flashprefill", "row-normalised", "forced", "random", "top-k", "top-p", "flexprefill", "xattention"]
_SCORED = ("flashprefill", "row-normalised", "forced")  # by the kernels


@dataclass(frozen=True)
class FlashPrefill:
    """Read prompts with attention to the blocks of keys that matter (FlashPrefill, arXiv 2603.06199 and 2608.19758).

    Tokens after the prompt attend to everything: all that are read fewer than 128 at a time. So do layers with a
    sliding window, a soft cap or sinks.

    Attributes:
        alpha: a block is left out where its energy is below this share of the largest one: 0 is dense, above 1 only
            the blocks that are always met remain. One number, one for each layer, or for each layer one for each head.
            Paper: 0.18 for Llama 3.1 8B, 0.08 for Qwen 2.5 7B, 0.12 for Qwen 3 30B-A3B (V1); 0.1 for all (V2).
        selection: how blocks are chosen. `flashprefill` is the paper's rule; `row-normalised` counts each query's share
            of attention instead of its weight (an extension). The others are controls: `forced` (none but the blocks
            that are always met), `random` (as many as `flashprefill` would choose), `top-k`, `top-p`, `flexprefill` and
            `xattention`.
        block_size: keys of a block (paper: 128; V2's code: 64).
        sink, window: first and latest blocks that are always met (paper: 2 and 4).
        last: tiles of 128 queries at the end of the prompt that meet everything (V1's code: 2).
        shared: one list of blocks for all query heads of a KV head (V2) instead of one for each (V1). With small heads
            it loses much. Of thresholds for each head that of the first one of each KV head counts.
        corrected: a block that is left out counts as its mean key and value (V2's mean correction).
        min_tokens: shorter prompts are read densely; `auto`: those for which sparse attention is not faster on this
            machine, by a short measurement on made-up queries and keys.
        dense_layers: first layers that stay dense.
        precision: of products on the CPU. `bf16` rounds to it where the processor multiplies that faster, as
            FlashAttention does; `exact` is fp32; `auto` goes by the dtype of the model. Native passes go by the type of
            their cache instead.
        estimate: estimate for each layer what share of the attention was left out; costs about as much as choosing.
        share: of the energy that `top-p`, `flexprefill` and `xattention` keep.
        count: blocks of `top-k`.
        seed: of `random`.
    """

    name: ClassVar[str] = "flash-prefill"

    alpha: float | list[float] | list[list[float]] = 0.1
    selection: Selection = "flashprefill"
    block_size: int = 128
    sink: int = 2
    window: int = 4
    last: int = 2
    shared: bool = False
    corrected: bool = False
    min_tokens: int | Literal["auto"] = "auto"
    dense_layers: int = 0
    precision: Precision = "bf16"
    estimate: bool = False
    share: float = 0.9
    count: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        try:
            alphas = torch.as_tensor(self.alpha, dtype=torch.float64, device="cpu").flatten()
        except (TypeError, ValueError) as error:
            raise UserError(
                "alpha: expected a number, one for each layer, or for each layer as many as it has heads."
            ) from error
        if not len(alphas) or not bool((alphas >= 0).all()) or bool(alphas.isinf().any()):
            raise UserError(f"alpha={self.alpha} is not in [0, ∞): 0 is dense, above 1 nothing is chosen.")
        if self.block_size < 16 or self.block_size % 16:
            raise UserError(
                f"block_size={self.block_size}: expected a multiple of 16; kernels are made for 64 and 128."
            )
        for name in ("sink", "window", "last", "dense_layers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: expected at least 0.")
        if self.min_tokens != "auto" and self.min_tokens < 0:
            raise UserError(f"min_tokens={self.min_tokens}: expected at least 0, or 'auto'.")
        if not 0 < self.share <= 1:
            raise UserError(f"share={self.share} is not in (0, 1].")
        if self.count < 1:
            raise UserError(f"count={self.count}: expected at least 1.")

    def __str__(self) -> str:
        if isinstance(self.alpha, int | float):
            alpha = f"α {self.alpha:g}"
        else:
            mean = float(torch.tensor(self.alpha).mean())
            alpha = f"α by {'layer' if isinstance(self.alpha[0], int | float) else 'head'}, mean {mean:.4g}"
        return described(self, f"{self.name} {alpha}", "alpha")

    @classmethod
    def candidates(cls, context: SearchContext) -> Sequence[Self]:
        """See `lissom.models.method.Method`."""
        if context.tokens < first_sparse(cls().rules()):  # all that there is is always met
            return []
        return [cls(alpha) for alpha in ((0.1,) if context.quick else (0.05, 0.1, 0.2))]

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[Report]:
        return applied(self, model)

    def calibrated(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        budget: float = 0.02,
        *,
        each: Each = "head",
        tokens: int = 8192,
        length: int = 4096,
        text: str | Path | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Self:
        """The same settings with the largest `alpha` that leaves out at most a share of the attention on some text.

        Prompts are read densely, and every threshold of a grid beside it; what each leaves out follows exactly from the
        log-sum-exps. Heads whose attention cannot be left out at that price stay dense.

        Args:
            tokenizer: default: the one that lies beside the model.
            budget: share of the attention, the mean over tokens.
            each: choose for each `head` or for each `layer`.
            tokens: of calibration text, in prompts of `length`.
            text: a text file; default: the built-in text.
            progress: called with (prompts read, prompts).

        Raises:
            UserError: the budget is no share, the text is missing or too short, or prompts of that length cannot be
                sparse.
        """
        alpha = calibrated(self, model, tokenizer, budget, each, tokens, length, text, progress)
        return replace(self, alpha=alpha)

    def rules(self) -> Rules:
        """What the kernels are told."""
        scoring = "row-normalised" if self.selection == "row-normalised" else "flashprefill"
        return Rules(scoring, self.block_size, self.sink, self.window, self.last, self.shared, self.corrected)

    @property
    def scored(self) -> bool:
        """Whether the kernels choose blocks by their rules, not a control."""
        return self.selection in _SCORED

    def select(self, layer: int, alpha: torch.Tensor) -> Select | None:
        """The control that chooses the blocks of a layer, whose thresholds are `alpha` `[query heads]`; None where the
        rules do."""
        if self.scored:
            return None
        return controls.control(self.selection, alpha, self.share, self.count, self.seed + 1000 * layer)

    def alphas(self, layers: int, heads: int) -> torch.Tensor:
        """`alpha` of every layer and query head, fp32 `[layers, heads]`.

        Raises:
            UserError: there are not as many numbers as the model has layers and heads, or fewer layers than are dense.
        """
        if self.dense_layers > layers:
            raise UserError(f"dense_layers={self.dense_layers}: the model has {layers} layers.")
        forced = self.selection == "forced"
        given = torch.as_tensor(2.0 if forced else self.alpha, dtype=torch.float32, device="cpu")
        if given.ndim and given.shape not in ((layers,), (layers, heads)):
            raise UserError(
                f"alpha has the shape {list(given.shape)}: the model has {layers} layers of {heads} query heads."
            )
        given = given.view(-1, 1) if given.ndim == 1 else given
        whole = given.expand(layers, heads).clone()
        whole[: self.dense_layers] = 0.0
        return whole
