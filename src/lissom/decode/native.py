"""`native-decode`: the passes of a running model in one native call each."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lissom.decode.passes import NativePasses, NotNative, Unsupported
from lissom.errors import UserError
from lissom.kernels import native
from lissom.kernels import packed as formats
from lissom.kernels.packed import Packed
from lissom.kernels.packed_layers import exchanged, skeleton
from lissom.kernels.rounding import GRIDS, rtn
from lissom.models.attention import installed
from lissom.models.method import SearchContext, changed
from lissom.models.plan import ARCHITECTURES, require_supported

logger = logging.getLogger(__name__)

_KV = {"bf16": torch.bfloat16, "int8": torch.int8, "fp32": torch.float32}
_PLANES = {"int8": 1, "int16": 2}
_WEIGHTS = ("native", "int8", "int4", "bf16")
# Arguments of a forward call that the native pass knows, or may ignore.
_KNOWN = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep")
_IGNORED = ("cache_position", "return_dict")


@dataclass(frozen=True)
class NativeDecode:
    """Run every pass of the model, prompt and tokens, in native code; what cannot be runs as before.

    Why a model or a pass runs as before is logged, once for each reason: hooks on modules inside the model,
    `output_attentions` or `output_hidden_states`, gradients, adapters that are not merged, architectures, masks and
    caches that the native pass does not know.

    Weights that change inside the block are noticed when the next prompt is read, and at every token where all of them
    change or move; weights that were packed for the block (`weights` other than `native`) stay what they were when it
    was entered.

    Attributes:
        weights: `native` is each layer's own (packed ones as they are, dense ones in their dtype); `bf16`, `int8` or
            `int4` packs dense layers so, by rounding to the nearest, with head and embedding at 8 bits at least.
        kv: the type of stored keys and values: `bf16`, `int8` (with a scale per token and head) or `fp32`.
        activations: what meets integer weights, with a scale for every 32: `int16`, which rounds next to nothing, or
            `int8`, with which prompts and batches take about half the time.
    """

    name: ClassVar[str] = "native-decode"
    runtime: ClassVar[bool] = True

    weights: Literal["native", "int8", "int4", "bf16"] = "native"
    kv: Literal["bf16", "int8", "fp32"] = "bf16"
    activations: Literal["int16", "int8"] = "int16"

    def __post_init__(self) -> None:
        if self.weights not in _WEIGHTS:
            raise UserError(f"weights={self.weights!r}: expected one of {', '.join(_WEIGHTS)}.")
        if self.kv not in _KV:
            raise UserError(f"kv={self.kv!r}: expected one of {', '.join(_KV)}.")
        if self.activations not in _PLANES:
            raise UserError(f"activations={self.activations!r}: expected one of {', '.join(_PLANES)}.")

    def __str__(self) -> str:
        others = ", ".join(f"{name} {value}" for name, value in changed(self).items())
        return f"native ({others})" if others else "native"

    @classmethod
    def candidates(cls, context: SearchContext) -> Sequence[Self]:
        """See `lissom.models.method.Method`.

        Without low-bit weights: `quantize` under native passes computes the same and keeps no second copy of them.
        """
        if native.library() is None or context.architecture not in ARCHITECTURES:
            return []
        integers = [cls(activations="int8")] if context.weight_bits < 16 else []
        return [cls(), *integers, cls(kv="int8")]

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return self._inside(model)

    def pack(self, model: PreTrainedModel) -> dict[str, Packed]:
        """What `weights` makes of the dense linear layers and embeddings of `model`, by name."""
        found, known = dict[str, Packed](), dict[int, Packed]()
        for name, module in model.named_modules() if self.weights != "native" else ():
            if hasattr(module, "packed") or skeleton(module, "q8", formats.GROUP) is None:
                continue
            weight: Any = module.weight
            if weight.data_ptr() not in known:  # a tied head is packed once
                known[weight.data_ptr()] = self._packed(weight.detach(), name)
            found[name] = known[weight.data_ptr()]
        return found

    def _packed(self, weight: torch.Tensor, name: str) -> Packed:
        if self.weights == "bf16":
            return formats.pack_floats(weight, "bf16")
        whole = self.weights == "int8" or name.rpartition(".")[2] in ("lm_head", "embed_tokens")
        formats.check_finite(weight, name)
        return rtn(weight, GRIDS["q8" if whole else "q4_min"], formats.GROUP).pack()

    def _passes(self, model: PreTrainedModel) -> NativePasses:
        return NativePasses(model, _KV[self.kv], _PLANES[self.activations])

    @contextmanager
    def _inside(self, model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            try:
                require_supported(model)
                # Modules are exchanged, so that a pass that falls back computes with the same weights.
                dense = stack.enter_context(exchanged(model, self.pack(model)))
                passes = self._passes(model)
            except Unsupported as error:
                stack.close()
                logger.warning("%s runs without native decode: %s.", type(model).__name__, error)
                yield
                return
            stack.enter_context(installed(model))
            kept = [tensor for module in dense.values() for tensor in module.parameters()]
            runner = _Runner(model, passes, self._passes, kept)
            original = model.__dict__.get("forward")
            model.forward = functools.wraps(model.forward)(runner)
            try:
                yield
            finally:
                if original is None:
                    del model.forward
                else:
                    model.forward = original


class _Runner:
    """Takes the place of a model's `forward`."""

    def __init__(
        self,
        model: PreTrainedModel,
        passes: NativePasses,
        remake: Callable[[PreTrainedModel], NativePasses],
        dense: Sequence[torch.Tensor],
    ) -> None:
        """`remake` makes the passes anew when a weight has changed; `dense` weights wait for the end of the block."""
        self._model, self._passes, self._remake, self.dense = model, passes, remake, dense
        self._unsupported = ""  # why the model, as it has become, has no passes
        self._plain = model.forward
        self._said: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model runs as it would outside the block."""
        model = memo.get(id(self._model), self._model)
        return types.MethodType(type(model).forward, model)

    def passes(self, thorough: bool = True) -> NativePasses:
        """Of the weights as they are now.

        Args:
            thorough: whether to look for every change (see `NativePlan.is_current`).

        Raises:
            NotNative: the model has become one that is not supported.
        """
        if self._unsupported and not thorough:
            raise NotNative(self._unsupported)
        if self._unsupported or not self._passes.plan.is_current(thorough):
            try:
                passes = self._passes = self._remake(self._model)
            except Unsupported as error:
                self._unsupported = str(error)
                raise NotNative(self._unsupported) from error
            self._unsupported = ""
            return passes
        return self._passes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = (
            "input_ids",
            "attention_mask",
            "position_ids",
            "past_key_values",
            "inputs_embeds",
            "labels",
            "use_cache",
        )
        given = dict(zip(names, args, strict=False)) | kwargs
        try:
            return self._native(given)
        except NotNative as error:
            reason = str(error)
            if reason not in self._said:
                self._said.add(reason)
                logger.warning("A pass runs without native decode: %s.", reason)
            return self._plain(*args, **kwargs)

    def _native(self, given: dict[str, Any]) -> CausalLMOutputWithPast:
        for name, value in given.items():
            if name not in _KNOWN and name not in _IGNORED and value is not None and value is not False:
                self._check_attentions(name, given.get("past_key_values"))
                raise NotNative(f"{name} is given")
        config = self._model.config
        for name in ("output_attentions", "output_hidden_states"):
            if given.get(name) is None and getattr(config, name, False):
                self._check_attentions(name, given.get("past_key_values"))
                raise NotNative(f"{name} is set in the model's config")
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        cache: Any = given.get("past_key_values")
        if ids is None or ids.ndim != 2:
            raise NotNative("the input is not [rows, tokens]")
        wanted = given.get("return_dict")
        if not (getattr(config, "return_dict", True) if wanted is None else wanted):
            raise NotNative("a tuple is wanted")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._model.parameters()):
            raise NotNative("gradients are wanted; use torch.no_grad() where they are not")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
            raise NotNative("the attention mask is not [rows, tokens]")
        own = cache is None
        if own:
            cache = DynamicCache(config=config)
        keep = self._kept(given.get("logits_to_keep", 0), ids.shape[1])
        logits = self.read(cache, ids, given.get("position_ids"), mask, keep)
        use = given.get("use_cache")
        wanted = config.get_text_config().use_cache if use is None else use
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache if wanted or not own else None)

    def read(
        self,
        cache: DynamicCache,
        ids: torch.Tensor,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        keep: Sequence[int] | None,
    ) -> torch.Tensor:
        """See `NativePasses.read`, which also wants no gradients."""
        if not ids.is_cpu:
            raise NotNative(f"the input is on {ids.device}")
        if self._model.training:
            raise NotNative("the model is in training mode")
        passes = self.passes(thorough=ids.shape[1] > 1 or cache.get_seq_length() == 0)
        if passes.has_hooks():
            raise NotNative("a module inside the model has a hook")
        passes.adopt(cache)
        return passes.read(cache, ids, positions, mask, keep)

    @staticmethod
    def _check_attentions(name: str, cache: Any) -> None:
        if name == "output_attentions" and any(getattr(layer, "store", None) for layer in getattr(cache, "layers", ())):
            raise UserError(
                "The weights of the attention over a cache in lissom's storage cannot be returned: give "
                "output_attentions from the first pass on."
            )

    @staticmethod
    def _kept(wanted: Any, tokens: int) -> list[int] | None:
        if isinstance(wanted, torch.Tensor):
            kept = torch.arange(tokens, device="cpu")[wanted].tolist()
            if kept != sorted(kept):
                raise NotNative("logits_to_keep is not in order")
            return kept
        return list(range(max(0, tokens - wanted), tokens)) if wanted else None


def next_logits(
    model: PreTrainedModel,
    ids: torch.Tensor,
    cache: Cache,
    mask: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits `[rows, vocabulary]` of what follows `ids`, fp32: what `model(...)` gives, with less around it in a block.

    To be called without gradients.

    Args:
        ids: int64 `[rows, tokens]`, appended to `cache`.
        mask, positions: as `attention_mask` and `position_ids` of a model.
    """
    runner = model.__dict__.get("forward")
    if isinstance(runner, _Runner) and not (model._forward_hooks or model._forward_pre_hooks):
        with suppress(NotNative):  # said below
            return runner.read(cache, ids, positions, mask, [ids.shape[1] - 1])[:, -1]
    output = model(
        ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    return output.logits[:, -1].float()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that lie in memory: the model's own and, in a block of `NativeDecode`, what the native pass
    has of them and dense ones that wait for the end of the block. Shared ones count once."""
    tensors = [*model.parameters(), *model.buffers()]
    runner = model.__dict__.get("forward")
    if isinstance(runner, _Runner):
        tensors += [*runner.passes().plan.tensors(), *runner.dense]
    sizes: dict[int, int] = {}
    for tensor in tensors:
        sizes[tensor.data_ptr()] = max(sizes.get(tensor.data_ptr(), 0), tensor.nbytes)
    return sum(sizes.values())
