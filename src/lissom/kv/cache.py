"""`CompactCache`: a transformers cache over ragged, biased storage."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from lissom.errors import UserError
from lissom.kernels import ragged_attention
from lissom.kv.storage import Block, RaggedStore
from lissom.models import describe_decoder
from lissom.models.attention import AttentionHandle, install

Observer = Callable[["CompactLayer", torch.Tensor, float, int], None]
Prompt = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]

# Up to here one pass over the ragged blocks is cheaper than making them dense; above, matrix products pay.
_FEW_QUERIES = 16
_QUERY_CHUNK = 512


class CompactLayer(CacheLayerMixin):
    """One layer: a compacted part, ragged over rows and heads, followed by a tail of plain tokens.

    The model sees the *logical* length (how many tokens were read), so rotary positions stay right however few
    entries are stored. The mask that transformers makes covers only the tail, whose entries stand one for one for
    the last tokens; everything before the tail is visible to every query.

    Attributes:
        store: the entries, or None before the first update.
        kv_dtype: of stored keys and values; None is the model's own.
        logical: tokens read so far, padding included.
        index: of the layer in the model.
        tail: entries at the end of every block that stand for the last `tail` tokens, one for one.
        observer: called with (layer, query, scaling, first), where a compaction wants the queries `[rows, query heads,
            tokens, head_dim]` from token `first` of the pass on; their keys and values are stored already.
        in_order: whether the observer changes the storage, and must be called before the layer's attention.
        follows: whether `after_pass` does anything.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False
    follows = False

    def __init__(self) -> None:
        self.store: RaggedStore | None = None
        self.kv_dtype: torch.dtype | None = None
        self.keys = self.values = None  # what other cache layers have; here `store` holds both
        self.index = 0
        self.logical = 0
        self.tail = 0
        self.observer: Observer | None = None
        self.in_order = False

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        return self.store is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if key_states.shape[-1] != value_states.shape[-1]:
            raise UserError("A compacted cache needs keys and values of one head_dim; this model has two.")
        rows, heads, tokens, size = key_states.shape
        self.begin(rows, heads, size, key_states.dtype, key_states.device, tokens)

    def begin(
        self, rows: int, heads: int, size: int, dtype: torch.dtype, device: torch.device | str, spare: int
    ) -> None:
        """Make the empty storage of `rows` and `heads` of head_dim `size`, with room for `spare` tokens."""
        vectors = torch.empty(0, size, dtype=self.kv_dtype or dtype, device=device)
        empty = Block(vectors, vectors, torch.empty(0, dtype=torch.int32, device=device))
        self.store = RaggedStore([empty] * (rows * heads), rows, spare, self.kv_dtype or dtype)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        self.make_room(key_states.shape[-2])
        self.store.append(key_states, value_states, self.logical)
        self.logical += key_states.shape[-2]
        self.tail += key_states.shape[-2]
        return AttentionHandle.of(self, key_states)

    def make_room(self, tokens: int) -> None:
        """Have room for `tokens` more."""
        assert self.store is not None
        self.store.make_room(tokens)

    def advance(self, tokens: int) -> None:
        """Count `tokens` that a native pass has appended to the storage itself."""
        assert self.store is not None
        self.store.spare -= tokens
        self.logical += tokens
        self.tail += tokens

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
        prompt: Prompt | None = None,
    ) -> torch.Tensor:
        """Attention over all stored entries.

        Args:
            query: `[rows, query heads, queries, head_dim]`, rotated.
            mask: bool `[rows, 1, queries, tail]`, true = visible; None = causal.
            scaling: factor on the logits, the module's own.
            softcap: logit soft cap; a few queries only.
            prompt: see `Attends.attend`.
        """
        if self.observer is not None:
            self.observer(self, query, scaling, 0)
        assert self.store is not None
        if prompt is not None and self.is_whole():
            keys, values, _ = self.store.padded()
            output = prompt(query, keys.to(query.dtype), values.to(query.dtype))
            if output is not None:
                return output
        if mask is not None:
            mask = mask[:, 0, :, -self.tail :].expand(query.shape[0], -1, -1)
        if query.shape[-2] <= _FEW_QUERIES:
            store = self.store
            parts = (store.keys, store.values, store.bias, store.starts, store.lengths)
            cap = softcap or 0.0
            return ragged_attention(query, *parts, mask, scaling, store.key_scales, store.value_scales, cap)
        if softcap is not None:
            raise UserError("A compacted cache does not support models with a logit soft cap.")
        return _attend_dense(self.store, query, mask, scaling, self.tail)

    def whole(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See `Attends.whole`; None where entries were compacted, are biased, or somebody observes the queries."""
        return self.store.padded()[:2] if self.store is not None and not self.observer and self.is_whole() else None

    def is_whole(self) -> bool:
        """Whether all that was read is stored as it was."""
        store = self.store
        return store is not None and store.bias is None and not bool((store.lengths != self.tail).any())

    @property
    def queries_wanted(self) -> int:
        """Of how many last tokens `after_pass` wants the queries."""
        return 0

    def after_pass(self, query: torch.Tensor | None, visible: torch.Tensor, scaling: float) -> None:
        """Called when the whole model has read some tokens natively.

        Args:
            query: `[rows, query heads, at most queries_wanted, head_dim]`, rotated.
            visible: bool `[rows, tail]`, false where a token is padding.
        """

    def seal(self, visible: torch.Tensor | None = None, keep_tail: int = 0) -> None:
        """End the tail but for its last `keep_tail` tokens: the others become part of what every later query sees.

        Args:
            visible: bool `[rows, at least tail]`; tokens that are padding (false) are removed from the storage.
        """
        assert self.store is not None
        sealed = self.tail - keep_tail
        if visible is not None and not bool(visible[:, -self.tail :][:, :sealed].all()):
            keep = visible[:, -self.tail :].to(self.store.keys.device).clone()
            keep[:, sealed:] = True
            blocks = []
            for index, block in enumerate(self.store.blocks()):
                before = len(block.keys) - self.tail
                kept = torch.cat([keep.new_ones(before), keep[index // self.store.heads]])
                bias = None if block.bias is None else block.bias[kept]
                blocks.append(Block(block.keys[kept], block.values[kept], block.positions[kept], bias))
            self.store = self.store.replaced(blocks)
        self.tail = keep_tail

    def get_seq_length(self) -> int:
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tail + query_length, self.logical - self.tail

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (transformers passes a negative number)."""
        tokens = -tokens_to_remove
        if tokens < 0:
            raise UserError(f"crop({tokens_to_remove}): give a negative number, that of the tokens to remove.")
        if tokens > self.tail:
            raise UserError(f"Only the last {self.tail} tokens of a compacted cache can be removed, not {tokens}.")
        if self.store is not None and tokens:
            self.store.drop_last(tokens)
            self.tail -= tokens
            self.logical -= tokens

    def checkpoint(self) -> Any:
        """What `restore` needs to forget everything that is read from now on."""
        return self.logical

    def restore(self, state: Any) -> None:
        """Forget what was read since `checkpoint`."""
        self.crop(state - self.logical)

    def reset(self) -> None:
        self.store, self.logical, self.tail = None, 0, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.store is not None:
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.store.select_rows(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.store.select_rows(torch.arange(self.store.rows, device="cpu").repeat_interleave(repeats))

    def offload(self) -> None:
        raise UserError("A cache in lissom's storage cannot be offloaded.")

    @property
    def stored_bytes(self) -> int:
        return 0 if self.store is None else self.store.stored_bytes

    @property
    def nbytes(self) -> int:
        return 0 if self.store is None else self.store.nbytes


class WindowLayer(CompactLayer):
    """A layer with a sliding window: it holds at least the tokens that the next one sees, and at most twice as many.

    It is not compacted. Older entries are dropped when there would be no room otherwise, so that nothing is copied at
    most steps.

    Attributes:
        window: of the model.
        record_past: whether everything is kept until the next `crop`, which can then forget all of it again: drafted
            tokens of another model.
    """

    is_sliding = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """See `Cache.activate_past_recording`."""
        self.record_past = True

    def make_room(self, tokens: int) -> None:
        """See `CompactLayer.make_room`."""
        assert self.store is not None
        if tokens <= self.store.spare:
            return
        if self.record_past:
            self.store.make_room(tokens)
            return
        self._forget_outside()
        self.store.reserve(max(tokens, self.window))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `CompactLayer.get_mask_sizes`. What is out of sight goes first: the mask covers what will be there."""
        if self.store is not None:
            self.make_room(query_length)
        return super().get_mask_sizes(query_length)

    def _forget_outside(self) -> None:
        outside = self.tail - (self.window - 1)
        if self.store is not None and outside > 0:
            self.store.drop_first(outside)
            self.tail -= outside

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
        prompt: Prompt | None = None,
    ) -> torch.Tensor:
        """See `CompactLayer.attend`; the mask that transformers makes knows the window."""
        if mask is None and self.tail > self.window:
            key = torch.arange(self.tail, device=query.device)
            place = key[-query.shape[-2] :, None]
            mask = ((key <= place) & (key > place - self.window))[None, None].expand(query.shape[0], -1, -1, -1)
        return super().attend(query, mask, scaling, softcap)

    def crop(self, tokens_to_remove: int) -> None:
        """See `CompactLayer.crop`."""
        left = self.logical + tokens_to_remove
        if self.tail + tokens_to_remove < min(self.window - 1, left):
            raise UserError(
                f"The cache of a layer with a sliding window cannot forget {-tokens_to_remove} tokens: "
                "what came before them is gone already."
            )
        super().crop(tokens_to_remove)
        if self.record_past:
            self._forget_outside()

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[rows, heads, tokens, head_dim]` of what the next token sees, as transformers holds them."""
        assert self.store is not None
        keys, values, _ = self.store.padded()
        return keys[:, :, 1 - self.window :].contiguous(), values[:, :, 1 - self.window :].contiguous()


def _attend_dense(
    store: RaggedStore, query: torch.Tensor, mask: torch.Tensor | None, scaling: float, tail: int
) -> torch.Tensor:
    """Attention of many queries: the blocks are made dense, aligned at their ends, and given to SDPA."""
    keys, values, bias = store.padded()
    queries, longest = query.shape[-2], keys.shape[-2]
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    if bias is None and mask is None and longest == queries:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    dtype = query.dtype
    if bias is not None:
        # SDPA takes it in the queries' dtype only, where 16 bits make e^β wrong by up to a per cent.
        query, keys, values = query.float(), keys.float(), values.float()
        bias = bias.repeat_interleave(groups, 1)[:, :, None]
    column = torch.arange(longest, device=query.device)
    outputs = []
    for start in range(0, queries, _QUERY_CHUNK):
        chunk = query[:, :, start : start + _QUERY_CHUNK]
        if mask is None:
            row = torch.arange(start, start + chunk.shape[-2], device=query.device)
            visible = (column <= row[:, None] + longest - queries)[None, None]
        else:
            visible = F.pad(mask[:, None, start : start + chunk.shape[-2]], (longest - tail, 0), value=True)
        allowed: torch.Tensor = visible
        if bias is not None:
            # A finite minimum: a padded query row that sees nothing must not become NaN.
            lowest = torch.finfo(query.dtype).min
            allowed = torch.where(visible, bias, lowest).clamp(min=lowest)
        outputs.append(F.scaled_dot_product_attention(chunk, keys, values, attn_mask=allowed, scale=scaling))
    return torch.cat(outputs, dim=2).to(dtype)


class CompactCache(DynamicCache):
    """A cache whose full-attention layers are `CompactLayer`s; sliding-window layers stay as they are.

    It is used as any other cache of transformers: `model.generate(..., past_key_values=cache)`. It belongs to the
    model it was made for. Use `copy()` to ask several questions of one document.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        require_full_attention(model)
        install(model)
        super().__init__(config=model.config)
        self.owner = weakref.ref(model)
        exchange_layers(self, model)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Cache.update`. Rows are repeated for beams, several answers, or several questions of one document."""
        rows, new = self.rows, key_states.shape[0]
        if rows and new != rows and new % rows == 0:
            self.batch_repeat_interleave(new // rows)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def rows(self) -> int:
        """Rows of the batch that was read, 0 while the cache is empty."""
        return next((layer.store.rows for _, layer in self.compact_layers() if layer.store is not None), 0)

    @property
    def heads(self) -> int:
        """KV heads of a layer, 0 while the cache is empty."""
        return next((layer.store.heads for _, layer in self.compact_layers() if layer.store is not None), 0)

    def copy(self) -> CompactCache:
        """An independent copy."""
        return copy.deepcopy(self)

    def compact_layers(self) -> list[tuple[int, CompactLayer]]:
        """See `compact_layers`."""
        return compact_layers(self)

    @property
    def stored_entries(self) -> int:
        return sum(layer.store.stored_entries for _, layer in self.compact_layers() if layer.store is not None)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the entries of the full-attention layers, without spare capacity."""
        return sum(layer.stored_bytes for _, layer in self.compact_layers())

    @property
    def nbytes(self) -> int:
        """Bytes that the full-attention layers have allocated, spare capacity included."""
        return sum(layer.nbytes for _, layer in self.compact_layers())


def require_full_attention(model: PreTrainedModel) -> None:
    """Raise a `UserError` where every layer has a sliding window, so that nothing of the cache can be compacted."""
    if all(describe_decoder(model).sliding):
        raise UserError(
            f"Every layer of {type(model).__name__} has a sliding window, which bounds its cache already: there is "
            "nothing to compact."
        )


def compact_layers(cache: Cache) -> list[tuple[int, CompactLayer]]:
    """The layers of any cache that can be compacted, with their indices."""
    return [
        (i, layer) for i, layer in enumerate(cache.layers) if isinstance(layer, CompactLayer) and not layer.is_sliding
    ]


def exchange_layers(
    cache: DynamicCache, model: PreTrainedModel, make: Callable[[], CompactLayer] = CompactLayer
) -> None:
    """Put layers of `make` in place of the growing layers of any cache, with what they hold.

    A cache that would make its layers as they come gets those that the model's config asks for.
    """
    if not cache.layers:
        cache.layers = DynamicCache(config=model.config).layers
    cache.layers = [_compacting(layer, make) for layer in cache.layers]
    cache.layer_class_to_replicate = None
    for index, layer in compact_layers(cache):
        layer.index = index


def _compacting(layer: CacheLayerMixin, make: Callable[[], CompactLayer]) -> CacheLayerMixin:
    if type(layer) is CompactLayer:  # of another method: it keeps its entries and its observer
        other = make()
        other.__dict__.update(layer.__dict__)
        return other
    if type(layer) is not DynamicLayer:
        return layer
    return _filled(make(), layer)


def _filled(own: CompactLayer, layer: CacheLayerMixin) -> CompactLayer:
    if layer.is_initialized and layer.keys is not None and layer.keys.numel():
        own.update(layer.keys, layer.values)
    return own


def exchange_windows(cache: DynamicCache) -> None:
    """Put `WindowLayer`s in place of transformers' layers with a sliding window, with what they hold."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            own = _filled(WindowLayer(layer.sliding_window), layer)
            own.index, own.logical, own.record_past = index, layer.cumulative_length, layer.record_past
            cache.layers[index] = own


def replace_blocks(layer: CompactLayer, blocks: Sequence[Block], tail: int) -> None:
    """Exchange the entries of `layer`; the last `tail` of every block stand for the last `tail` tokens."""
    assert layer.store is not None
    layer.store = layer.store.replaced(blocks)
    layer.tail = tail


def cache_bytes(cache: Cache) -> int:
    """Bytes that the entries of any cache take, counted from storage: keys, values, and positions and biases if any."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, CompactLayer):
            total += layer.stored_bytes
        elif layer.is_initialized:
            total += sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None)
    return total
