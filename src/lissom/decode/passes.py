"""Passes of a whole model in native code, over any cache whose layers are in lissom's storage."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch.nn.modules import module as every_module
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, PreTrainedModel

from lissom.errors import UserError
from lissom.kernels import decoder
from lissom.kernels.ragged_attention import KV_TYPES, KeyValues
from lissom.kv.cache import CompactCache, CompactLayer, WindowLayer, exchange_layers, exchange_windows
from lissom.models.attention import MASK, NativeReading, NotNatively, leave_dense, prompt_method
from lissom.models.plan import NativePlan, Unsupported

# Tokens of all rows that one native call reads at most: enough that unpacking the weights does not matter.
_CHUNK = 512
_CAPTURING = "transformers.utils.output_capturing"


class NotNative(Exception):
    """This call cannot run natively; says why."""


class NativePasses:
    """Reads tokens of one model natively.

    Attributes:
        plan: of the model's weights; made anew when a weight has changed.
    """

    def __init__(self, model: PreTrainedModel, kv_dtype: torch.dtype, planes: int = 2) -> None:
        """
        Raises:
            Unsupported: the model is not what the native pass computes.
        """
        self._model, self._kv_dtype = model, kv_dtype
        self.plan = NativePlan(model, planes)
        self._outputs = self.plan.plan.head.rows
        self._hooks: list[dict[int, Any]] = [
            hooks
            for module in model.modules()
            if module is not model  # whose own hooks run around its forward function, ours or not
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._hooks += [every_module._global_forward_hooks, every_module._global_forward_pre_hooks]
        # Hooks that had been registered anywhere when the last look found none of them here.
        self._registered = -1
        # What the last call saw of the stores. One attribute, since several threads may read at once.
        self._seen: tuple[list[int], Any] = ([], None)
        self._mark = object()  # of these passes, on caches that they have adopted
        # Frequencies that follow the length are the plan's, for one sequence at a time.
        self._turn: Any = threading.RLock() if self.plan.rotations_depend_on_length else nullcontext()

    def adopt(self, cache: DynamicCache) -> None:
        """Put the cache's layers into lissom's storage, with what they hold.

        Raises:
            NotNative: one of them cannot be.
            UserError: the cache is of another model.
        """
        adopted = getattr(cache, "_adopted", None)
        if adopted and adopted[0] is self._mark and adopted[1] == cache.layers:
            return
        if not (type(cache) is DynamicCache or isinstance(cache, CompactCache)):
            raise NotNative(f"the cache is a {type(cache).__name__}")
        if cache.offloading:
            raise NotNative("the cache is offloaded")
        if not all(isinstance(layer, CompactLayer) for layer in cache.layers) or not cache.layers:
            exchange_layers(cache, self._model)
            exchange_windows(cache)
        info = self.plan.info
        if len(cache.layers) != info.num_hidden_layers:
            raise UserError(f"The cache has {len(cache.layers)} layers, the model {info.num_hidden_layers}.")
        for layer, window in zip(cache.layers, self.plan.windows, strict=False):
            if not isinstance(layer, CompactLayer):
                raise NotNative(f"the cache has a {type(layer).__name__}")
            if window and not (isinstance(layer, WindowLayer) and layer.window == window):
                raise NotNative("the cache has other windows than the model")
            if layer.store is None:
                layer.kv_dtype = self._kv_dtype
        cache._adopted = self._mark, list(cache.layers)

    def has_hooks(self) -> bool:
        """Whether somebody listens to a module inside the model. transformers' own hooks stay once installed, and do
        nothing unless they are asked."""
        registered = RemovableHandle.next_id  # PyTorch counts them
        if registered == self._registered:
            return False
        found = any(hook.__module__ != _CAPTURING for hooks in self._hooks for hook in hooks.values())
        self._registered = -1 if found else registered
        return found

    def read(
        self,
        cache: DynamicCache,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        keep: Sequence[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Read `ids`: their keys and values are appended to the cache.

        Args:
            cache: which `adopt` has taken.
            ids: int64 `[rows, tokens]`.
            positions: int64 `[rows or 1, tokens]` for the rotations; default: behind what was read.
            mask: `[rows, tokens read + tokens]`, 0 where a token is padding.
            keep: tokens whose logits are wanted, in ascending order; default all.
            progress: called with the number of tokens after each stretch of them.

        Returns:
            Logits `[rows, len(keep), vocabulary]`, fp32.

        Raises:
            NotNative: the mask has gaps, the cache another number of rows, or somebody wants to see each layer alone.
            UserError: a token is outside the vocabulary, or there is none; or the cache has left the CPU.
        """
        if not ids.numel():
            raise UserError(f"There is nothing to read: the input has the shape {list(ids.shape)}.")
        with self._turn:
            return self._read(cache, ids.long(), positions, mask, keep, progress)

    def _read(
        self,
        cache: DynamicCache,
        ids: torch.Tensor,
        positions: torch.Tensor | None,
        mask: torch.Tensor | None,
        keep: Sequence[int] | None,
        progress: Callable[[int], None] | None,
    ) -> torch.Tensor:
        rows, tokens = ids.shape
        layers: list[Any] = cache.layers
        logical = layers[0].logical
        if positions is not None:
            if tokens > 1 and not self._ascending(positions, mask):
                raise NotNative("the position ids are not consecutive")
            positions = positions.long().expand(rows, tokens)
        gaps = self._gaps(mask, layers, rows, tokens)
        wanted = range(tokens) if keep is None else keep
        logits = _floats(rows, len(wanted), self._outputs)
        chunk = max(1, _CHUNK // rows)
        if self.plan.rotations_depend_on_length:
            self.plan.refresh(logical + tokens if positions is None else int(positions.max()) + 1)
        followed = [layer for layer in layers if layer.follows]
        recent = max((layer.queries_wanted for layer in followed), default=0)
        observed = [layer for layer in layers if layer.observer is not None]
        if any(layer.in_order for layer in observed):
            raise NotNative("a method compacts each layer on the way")
        scaling = float(self.plan.plan.attention_scale)
        queries: list[torch.Tensor] = []
        sparse = self._sparse(layers, rows, tokens, gaps) if tokens > 1 else None
        self._make_room(layers, rows, tokens)
        done = 0
        edges = [*range(0, tokens, chunk), tokens] if sparse is None else sparse.edges(tokens, logical + tokens, chunk)
        for first, last in pairwise(edges):
            here = [token - first for token in wanted if first <= token < last]
            whole = last - first == tokens  # slices are left out where they can be: at one token they are felt
            part = None if not here else logits if whole else logits[:, done : done + len(here)]
            if positions is None:
                places: Any = _int64s([*range(logical + first, logical + last)] * rows)
            else:
                places = positions[:, first:last].contiguous()
            holes = None if gaps is None else self._holes(gaps, tokens - last)
            taken = self._query_buffer(rows * (last - first)) if observed or last > tokens - recent else None
            told = None if sparse is None else sparse.begin(last - first, logical + last, tokens - last)
            self._step(layers, ids if whole else ids[:, first:last], places, holes, here, part, told, taken)
            if sparse is not None:
                sparse.end()
            if taken is not None:  # [layers, rows, heads, tokens, head_dim]
                seen = taken.unflatten(1, (rows, last - first)).transpose(2, 3)
                for layer in observed:
                    layer.observer(layer, seen[layer.index], scaling, first)
                if last > tokens - recent:
                    queries.append(seen[:, :, :, max(0, tokens - recent - first) :])
            done += len(here)
            if progress is not None:
                progress(last)
        last_queries = torch.cat(queries, 3) if queries else None
        for layer in followed:
            visible = torch.ones(rows, layer.tail, dtype=torch.bool) if mask is None else mask[:, -layer.tail :].bool()
            own = None if last_queries is None else last_queries[layer.index]
            layer.after_pass(own, visible, scaling)
        return logits

    def _sparse(self, layers: list[Any], rows: int, tokens: int, gaps: torch.Tensor | None) -> NativeReading | None:
        """How a method that computes the attention of prompts has this one read, if there is such a method."""
        method = prompt_method(self._model)
        if method is None:
            return None
        entries = layers[0].logical + tokens
        padding = [0] * rows
        if gaps is not None:
            padding = (entries - gaps[:, 1]).tolist()
            if bool((gaps[:, 0] < entries).logical_and(gaps[:, 0] > gaps[:, 1]).any()):
                leave_dense(method, MASK)
                return None
        whole = [layer.store is None or layer.is_whole() for layer in layers]
        try:
            return method.natively(self._model, tokens, entries, padding, whole)
        except NotNatively as error:
            raise NotNative(str(error)) from error

    def _query_buffer(self, vectors: int) -> torch.Tensor:
        info = self.plan.info
        return _floats(info.num_hidden_layers, vectors, info.num_attention_heads, info.head_dim)

    def _step(
        self,
        layers: list[Any],
        ids: torch.Tensor,
        positions: Any,
        holes: torch.Tensor | None,
        keep: Sequence[int],
        out: torch.Tensor | None,
        sparse: Any,
        queries: torch.Tensor | None,
    ) -> None:
        rows, count = ids.shape
        stores = self._native_stores(layers, count)
        ids = ids.contiguous()
        wanted = _int64s([row * count + token for row in range(rows) for token in keep])
        direct = out is not None and out.is_contiguous()
        logits = None if out is None else out if direct else _floats(*out.shape)
        parts = ids, positions, holes, stores, wanted, logits, sparse, queries
        step = decoder.Step(*map(_address, parts), rows, count, len(wanted), layers[0].logical)
        try:
            decoder.decode(self.plan.plan, step)
            for layer in layers:
                layer.advance(count)
        except ValueError as error:
            vocabulary = self.plan.plan.embedding.rows
            raise UserError(f"A token id is outside the vocabulary of {vocabulary} tokens.") from error
        except BaseException:
            # Ctrl-C after the call: what has been read counts in every layer, so that the cache can be gone on with.
            for layer in layers:
                if layer.store.uncounted:
                    layer.advance(layer.store.uncounted)
            raise
        if out is not None and logits is not None and not direct:
            out.copy_(logits)

    def _make_room(self, layers: list[Any], rows: int, tokens: int) -> None:
        """Storage for what is going to be read: all at once, since growing on the way copies what is there."""
        info, short = self.plan.info, []
        for layer in layers:
            store = layer.store
            if store is None or store.spare < tokens:
                short.append(layer)
            if store is not None and store.rows != rows:
                raise NotNative(f"the cache has {store.rows} rows, the input {rows}")
            if store is not None and not store.keys.is_cpu:
                raise UserError(f"The cache is on {store.keys.device} and the model on the CPU: read the prompt again.")
        for layer in short:
            room = 0 if layer.is_sliding else tokens  # what has a window makes it on the way, of what is out of sight
            if layer.store is None:
                layer.begin(rows, info.num_key_value_heads, info.head_dim, self._kv_dtype, "cpu", room + 64)
            else:
                layer.make_room(room)

    def _native_stores(self, layers: list[Any], count: int) -> Any:
        layouts = []
        for layer in layers:
            if layer.store.spare < count:
                layer.make_room(count)
            layouts.append(layer.store.layout)
        known, stores = self._seen
        if layouts != known:
            for layer in layers:
                self._fit(layer)
            stores = (KeyValues * len(layers))(*(layer.store.native() for layer in layers))
            self._seen = [layer.store.layout for layer in layers], stores
        return stores

    def _fit(self, layer: CompactLayer) -> None:
        """Make sure that the native pass can read what somebody else may have filled."""
        assert layer.store is not None
        info, store = self.plan.info, layer.store
        if (store.heads, store.head_dim) != (info.num_key_value_heads, info.head_dim):
            raise UserError(
                f"The cache has {store.heads} KV heads of size {store.head_dim}, the model "
                f"{info.num_key_value_heads} of {info.head_dim}: it is another model's."
            )
        if store.dtype not in KV_TYPES:
            layer.store = store.converted(self._kv_dtype)

    @staticmethod
    def _ascending(positions: torch.Tensor, mask: torch.Tensor | None) -> bool:
        steps = positions[:, 1:] - positions[:, :-1] == 1
        if mask is not None:  # padding may have any position
            real = mask[:, -positions.shape[1] :].bool()
            steps = steps | ~(real[:, 1:] & real[:, :-1])
        return bool(steps.all())

    @staticmethod
    def _gaps(mask: torch.Tensor | None, layers: list[Any], rows: int, tokens: int) -> torch.Tensor | None:
        """Padding of each row as `[rows, 2]`: from how many tokens before the end to how many. None without any."""
        if mask is not None and mask.shape != (rows, layers[0].logical + tokens):
            raise NotNative(f"the attention mask {list(mask.shape)} is not one of {layers[0].logical + tokens} tokens")
        if mask is None or bool(mask.all()):
            return None
        whole = next((layer for layer in layers if not isinstance(layer, WindowLayer)), layers[0])
        if any(layer.tail != whole.tail for layer in layers if not isinstance(layer, WindowLayer)):
            raise NotNative("layers have different numbers of uncompacted tokens")
        hidden = mask[:, -(whole.tail + tokens) :] == 0
        width = hidden.shape[1]
        first = hidden.int().argmax(1)
        number = hidden.sum(1)
        place = torch.arange(width, device="cpu")
        if bool((hidden != ((place >= first[:, None]) & (place < (first + number)[:, None]))).any()):
            raise NotNative("the attention mask has more than one gap")
        return torch.stack([width - first, width - first - number], 1)

    @staticmethod
    def _holes(gaps: torch.Tensor, left: int) -> torch.Tensor:
        """`gaps` as seen from the end of a stretch behind which `left` tokens are still to come."""
        return (gaps - left).clamp(min=0).contiguous()


def _int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Some numbers for the native pass, made in a fraction of the time that a tensor takes."""
    return (ctypes.c_int64 * len(values))(*values)


def _address(part: Any) -> int | None:
    """Where a tensor or an array lies."""
    return None if part is None else part.data_ptr() if isinstance(part, torch.Tensor) else ctypes.addressof(part)


def _floats(*shape: int) -> torch.Tensor:
    """Where the native pass writes: never in PyTorch's default dtype or device, which may be others."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


__all__ = ["NativePasses", "NotNative", "Unsupported"]
