"""`kv-budget`: a long conversation or a long generation inside a fixed number of bytes.

Each layer has an equal share of the budget. When a forward pass leaves a layer above its share, everything but the
last few tokens is compacted, biases of earlier compactions included, on the queries of the latest tokens. It works
with any compactor; with `streaming-llm` it is the sliding window with sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import InstanceOf
from transformers import DynamicCache, PreTrainedModel

from lissom.errors import UserError
from lissom.kv.attention_matching import AttentionMatching
from lissom.kv.cache import CompactCache, CompactLayer, Prompt, exchange_layers, require_full_attention
from lissom.kv.compact import compact_layer
from lissom.kv.compactor import Compactor, check_whole
from lissom.kv.eviction import SCORES, Eviction
from lissom.kv.harvest import Evidence, in_own_pass
from lissom.models import describe_decoder
from lissom.models.attention import installed
from lissom.models.byte_sizes import parse_bytes
from lissom.models.calls import argument
from lissom.models.method import SearchContext, described

_COMPACTORS: dict[str, type[Compactor]] = {kind.name: kind for kind in (AttentionMatching, Eviction)}


@dataclass(frozen=True)
class KVBudget:
    """Keep the KV cache of the full-attention layers within `size`.

    After every forward pass the stored entries take at most `size`; during a pass at most one layer at a time is above
    its share, by the tokens of that pass. Layers with a sliding window keep their own and do not count.

    Attributes:
        size: bytes, or text such as '64MB'; for all rows together.
        method: one of the eviction scores, `attention-matching`, or a compactor with settings of its own, as an object
            or as `{name: settings}`; its ratio is ignored.
        protect: last tokens that are not compacted (paper: 20).
        target: share of `size` to which a compaction shrinks; smaller means fewer and stronger compactions.
        window: last tokens whose queries are the reference for the next compaction.
    """

    name: ClassVar[str] = "kv-budget"

    size: int | str
    method: str | dict[str, Any] | InstanceOf[Compactor] = "h2o"
    protect: int = 20
    target: float = 0.5
    window: int = 256

    def __post_init__(self) -> None:
        parse_bytes(self.size)
        self.compactor()
        if not 0.0 < self.target < 1.0:
            raise UserError(f"target={self.target} is not in (0, 1): it is the share of the budget that is left.")
        check_whole("protect", self.protect, 1)
        check_whole("window", self.window, 1)

    def __str__(self) -> str:
        return described(self, f"{self.name} {self.bytes / 1e6:.4g} MB", "size")

    @classmethod
    def candidates(cls, context: SearchContext) -> list[Self]:
        """See `lissom.models.method.Method`."""
        shares = (0.5,) if context.quick else (0.5, 0.25)
        methods = ("h2o", "streaming-llm")
        return [cls(int(share * context.cache_bytes), method) for method in methods for share in shares]

    @property
    def bytes(self) -> int:
        """`size` as a number."""
        return parse_bytes(self.size)

    def compactor(self) -> Compactor:
        """The method that shrinks a layer."""
        if isinstance(self.method, Compactor):
            return self.method
        if self.method == AttentionMatching.name:
            return AttentionMatching(queries="context")
        if isinstance(self.method, str) and self.method in SCORES:
            return Eviction(score=self.method)
        if isinstance(self.method, dict) and len(self.method) == 1:
            ((name, settings),) = self.method.items()
            if name in _COMPACTORS:
                try:
                    return _COMPACTORS[name](**(settings or {}))
                except TypeError as error:
                    raise UserError(f"method={self.method!r}: {error}.") from error
        known = ", ".join((AttentionMatching.name, *SCORES))
        raise UserError(f"method={self.method!r}: expected one of {known}.")

    def cache(self, model: PreTrainedModel) -> CompactCache:
        """An empty cache within the budget, to be handed to `generate` turn after turn."""
        cache = CompactCache(model)
        self._adopt(cache, model)
        return cache

    def __call__(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return self._within(model)

    @contextmanager
    def _within(self, model: PreTrainedModel) -> Iterator[None]:
        def before(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = argument(module, "past_key_values", args, kwargs)
            if cache is None or in_own_pass():
                return
            if not isinstance(cache, DynamicCache):
                raise UserError(f"{type(cache).__name__} has no budget: generate with the default (dynamic) cache.")
            self._adopt(cache, model)

        require_full_attention(model)
        with installed(model):
            hook = model.register_forward_pre_hook(before, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()

    def _adopt(self, cache: DynamicCache, model: PreTrainedModel) -> None:
        """Exchange the cache's growing layers for ones that keep to their share; what they hold stays."""
        others = [layer.settings for layer in cache.layers if isinstance(layer, BudgetLayer)]
        if others:
            if others[0] != self:
                raise UserError(f"The cache has a budget already ({others[0]}): one is enough.")
            return
        full = describe_decoder(model).sliding.count(False)
        share = max(1, self.bytes // max(1, full))
        exchange_layers(cache, model, lambda: BudgetLayer(self, share))


class BudgetLayer(CompactLayer):
    """A layer that compacts itself when a pass leaves it above its share of the budget.

    Attributes:
        settings: the budget.
        share: bytes of this layer.
        method: what shrinks the layer.
        paused: true while a pass is read that will be forgotten.
        recent: queries `[rows, query heads, tokens, head_dim]` of the last tokens, with their `places` `[tokens]` and
            whether they are real, `[rows, tokens]`.
    """

    follows = True

    def __init__(self, settings: KVBudget, share: int) -> None:
        super().__init__()
        self.settings, self.share, self.paused = settings, share, False
        self.method = settings.compactor()  # once: it is asked for at every token
        self.recent: torch.Tensor | None = None
        self.places = torch.empty(0, dtype=torch.int64)
        self.real = torch.empty(0, 0, dtype=torch.bool)
        self.scaling = 1.0

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
        prompt: Prompt | None = None,
    ) -> torch.Tensor:
        """See `CompactLayer.attend`; afterwards the layer is within its share."""
        output = super().attend(query, mask, scaling, softcap, prompt)
        visible = torch.ones(query.shape[0], self.tail, dtype=torch.bool)
        if mask is not None:  # what the last query may see is what is no padding
            visible = mask[:, 0, -1, -self.tail :].expand(query.shape[0], -1).cpu()
        self.after_pass(query, visible, scaling)
        return output

    @property
    def queries_wanted(self) -> int:
        """See `CompactLayer.queries_wanted`."""
        return 0 if self.method.queries == "none" else self.settings.window

    def after_pass(self, query: torch.Tensor | None, visible: torch.Tensor, scaling: float) -> None:
        """See `CompactLayer.after_pass`: the layer is brought within its share."""
        if self.method.queries != "none":
            assert query is not None
            self._remember(query, visible, scaling)
        assert self.store is not None
        if not self.paused and self.store.stored_entries * self._entry_bytes() > self.share:
            self._shrink(visible)

    def _entry_bytes(self) -> int:
        assert self.store is not None
        return self.store.entry_bytes + (4 if self.store.bias is None else 0)  # a compaction may bring biases

    def _remember(self, query: torch.Tensor, visible: torch.Tensor, scaling: float) -> None:
        # A copy: a view would keep the queries of the whole prompt alive.
        last = query[:, :, -self.settings.window :].detach().clone()
        places = torch.arange(self.logical - last.shape[2], self.logical)
        real = visible[:, -last.shape[2] :]
        if self.recent is not None:
            keep = self.settings.window - last.shape[2]
            start = max(0, self.recent.shape[2] - keep)
            last = torch.cat([self.recent[:, :, start:], last], 2)
            places, real = torch.cat([self.places[start:], places]), torch.cat([self.real[:, start:], real], 1)
        self.recent, self.places, self.real, self.scaling = last, places, real, scaling

    def _shrink(self, visible: torch.Tensor) -> None:
        store, settings = self.store, self.settings
        assert store is not None
        method, entry = self.method, self._entry_bytes() * store.rows * store.heads
        keep = min(settings.protect, self.tail)
        wanted = int(settings.target * self.share) // entry - keep
        least = method.sinks + method.recent + 1
        if wanted < least:
            layers = max(1, settings.bytes // self.share)
            needed = int((least + keep + 1) * entry / settings.target + 1) * layers
            raise UserError(
                f"A KV budget of {settings.bytes / 1e6:.3g} MB is too small: the sinks and the last {keep} tokens of "
                f"{store.rows} row{'s' * (store.rows > 1)} need {needed / 1e6:.3g} MB."
            )
        self.seal(visible, keep_tail=keep)
        compact_layer(self, method, self, [[wanted] * store.heads] * store.rows)
        assert self.store is not None
        # Room up to the share at once: nothing is copied until the next compaction, and no more is ever allocated.
        self.store.reserve(self.share // entry - int(self.store.lengths.max()))

    def of(self, layer: CompactLayer, row: int, heads: int) -> Evidence | None:
        """See `lissom.kv.harvest.QuerySource`: the latest tokens' queries."""
        if self.recent is None:
            return None
        return Evidence.of(self.recent[row], self.places, self.real[row], heads, self.scaling)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.recent is not None:
            self.recent, self.real = self.recent[indices], self.real[indices.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.recent is not None:
            self.recent = self.recent.repeat_interleave(repeats, 0)
            self.real = self.real.repeat_interleave(repeats, 0)

    def checkpoint(self) -> Any:
        """See `CompactLayer.checkpoint`: until `restore` the layer may grow, so that it can forget again."""
        self.paused = True
        return super().checkpoint(), self.recent, self.places, self.real

    def restore(self, state: Any) -> None:
        """See `CompactLayer.restore`."""
        logical, self.recent, self.places, self.real = state
        super().restore(logical)
        self.paused = False

    def crop(self, tokens_to_remove: int) -> None:
        """See `CompactLayer.crop`; the queries of what is removed are forgotten, too."""
        super().crop(tokens_to_remove)
        if self.recent is not None:
            keep = self.places < self.logical
            self.recent, self.places, self.real = self.recent[:, :, keep], self.places[keep], self.real[:, keep]

    def reset(self) -> None:
        super().reset()
        self.recent = None
