"""What takes reference tokens out of a transformer's inputs, and gives it their keys and values instead."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry, ModelHook
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache, Flux2Transformer2DModelOutput

from lissom.diffusion.klein_kv.store import Entry, ReferenceStore, Storage, pack, unpack
from lissom.diffusion.references import POSITION_OF_REFERENCES, REFERENCE_DISTANCE, layers, moved, prepare, read
from lissom.errors import UserError

_HOOK = "lissom_klein_kv"
_Reading = Callable[[torch.Tensor, torch.Tensor], Flux2KVCache]  # of tokens of one row and their positions


@dataclass
class KleinKVReport:
    """What happened while the cache was on.

    Attributes:
        reference_passes: passes over references.
        cached_passes: passes of the transformer that took references from the cache. The first step of a single picture
            reads them by itself.
        damage: where the model was not trained for it, the relative distance of the first output of a pass without
            references to that of a whole one.
        store: what is held, with its hits and misses.
    """

    store: ReferenceStore
    reference_passes: int = 0
    cached_passes: int = 0
    damage: float | None = None


@contextmanager
def hooked(transformer: torch.nn.Module, hook: ModelHook) -> Iterator[None]:
    """With `hook` around the transformer's passes, which can take caches where it is of FLUX.2."""
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if registry.get_hook(_HOOK) is not None:
        raise UserError("Klein KV is on in this pipeline already.")
    processors = dict(transformer.attn_processors)
    if isinstance(transformer, Flux2Transformer2DModel):
        prepare(transformer)
    registry.register_hook(hook, _HOOK)
    try:
        yield
    finally:
        registry.remove_hook(_HOOK, recurse=False)
        transformer.set_attn_processor(processors)


class ReferenceHook(ModelHook):
    """References of a request are read where the store does not have them, and are in no pass of a step.

    Args:
        storage: see `KleinKV`.
        model: its fingerprint.
        trained: what references see.

    Attributes:
        found: of the first row of each pass over references, by the place on the first axis of positions where it
            begins: one entry for all, or one for each where each sees only itself.
        guidance: that the model was told with them, where it is told one.
    """

    def __init__(self, report: KleinKVReport, storage: Storage, model: str, trained: str) -> None:
        super().__init__()
        self.report, self.storage, self.model, self.trained = report, storage, model, trained
        self.found: dict[int, tuple[Entry, ...]] = {}
        self.guidance: float | None = None
        self.reading = False
        self.recent: list[tuple[torch.Tensor, torch.Tensor, float | None, Flux2KVCache]] = []

    def new_forward(self, module: Flux2Transformer2DModel, *args: Any, **kwargs: Any) -> Any:
        """A pass without reference tokens where there were some."""
        forward = self.fn_ref.original_forward
        if self.reading:
            return forward(*args, **kwargs)
        given = arguments_of(module, args, kwargs)
        ids = given["img_ids"][0] if given["img_ids"].ndim == 3 else given["img_ids"]
        references = ids[:, POSITION_OF_REFERENCES] != 0
        if given.get("kv_cache") is not None or not references.any():
            self.report.cached_passes += given.get("kv_cache") is not None
            return forward(**given)
        if given.get("joint_attention_kwargs") or given.get("ref_fixed_timestep"):
            raise UserError(
                "Of references it is not known with which attention_kwargs or ref_fixed_timestep they were read: leave "
                "them out, and set the strength of adapters by set_adapters."
            )
        hidden = given["hidden_states"]
        asked = given.get("kv_cache_mode") == "extract"
        changed = {"hidden_states": hidden[:, ~references], "img_ids": ids[~references]}
        step = _ReadingStep(forward, given | changed)
        alone = self.trained != "set" or self.storage != "model" or len(hidden) > 1 or bool(references.all())
        guidance = given.get("guidance")

        def read_row(tokens: torch.Tensor, places: torch.Tensor) -> Flux2KVCache:
            if module.is_cache_enabled:
                raise UserError(
                    "A step cache is on, and a pass over references would go into it as a step: read them with "
                    "KleinKV().prefill before enable_cache, and give the request none."
                )
            return self._read(module, tokens, places, guidance) if alone else step(tokens, places)

        cache = self._cache(module, hidden[:, references], ids[references], embedded(guidance), read_row)
        if asked and references.all():  # a pipeline that reads them by itself
            return hidden[:, :0], _shared(cache)
        output = step.output
        if output is None:
            output = forward(**given | cached(cache) | changed)
            self.report.cached_passes += 1
        if self.trained == "joint" and self.report.damage is None:
            own = forward(**given | {"return_dict": False})[0][:, ~references]
            ours = output[0] if isinstance(output, tuple) else output.sample
            self.report.damage = float((ours - own).norm() / own.norm())
        if not asked:
            return output
        if isinstance(output, tuple):
            return (*output, _shared(cache))
        return Flux2Transformer2DModelOutput(sample=output.sample, kv_cache=_shared(cache))

    def _cache(
        self,
        module: Flux2Transformer2DModel,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        guiding: float | None,
        read_row: _Reading,
    ) -> Flux2KVCache:
        """Keys and values of the references of every row of the batch.

        Args:
            read_row: reads those that the store does not have.
        """
        for known, places, known_guidance, cache in self.recent:
            if guiding == known_guidance and torch.equal(places, ids) and torch.equal(known, tokens):
                return cache
        rows = tokens[:1] if bool((tokens == tokens[:1]).all()) else tokens
        found = [self._row(row[None], ids, guiding, read_row) for row in rows]
        slots = ids[:, POSITION_OF_REFERENCES].unique_consecutive().tolist()
        self.found[slots[0]], self.guidance = found[0], guiding
        cache = batched(module, found, slots if self.trained == "each" else None, tokens.shape[0], tokens.device)
        at_hand = 8 if self.trained == "each" else 1  # what a request has: some pipelines read one after the other
        self.recent = [*self.recent, (tokens, ids, guiding, cache)][-at_hand:]
        return cache

    def _row(
        self, tokens: torch.Tensor, ids: torch.Tensor, guiding: float | None, read_row: _Reading
    ) -> tuple[Entry, ...]:
        """The references of one row, from the store where it has them."""
        lengths = ids[:, POSITION_OF_REFERENCES].unique_consecutive(return_counts=True)[1].tolist()
        parts = lengths if self.trained == "each" else [len(ids)]
        found = []
        for part, places in zip(tokens.split(parts, 1), ids.split(parts), strict=True):
            if self.trained == "each":  # in the place of the first, wherever it is: then it is found again in any
                places = places.clone()
                places[:, POSITION_OF_REFERENCES] = REFERENCE_DISTANCE
            key = _key(self.model, part, places, guiding, self.storage)
            entry = self.report.store.get(key)
            if entry is None:
                cache = read_row(part, places)
                self.report.reference_passes += 1
                entry = Entry(
                    tuple(pack(layer.k_ref.detach(), self.storage) for layer in layers(cache)),
                    tuple(pack(layer.v_ref.detach(), self.storage) for layer in layers(cache)),
                )
                self.report.store.put(key, entry)
            found.append(entry)
        return tuple(found)

    def _read(
        self, module: Flux2Transformer2DModel, tokens: torch.Tensor, ids: torch.Tensor, guidance: torch.Tensor | None
    ) -> Flux2KVCache:
        """By a pass of the same transformer, which is not this hook's business."""
        self.reading = True
        try:
            return read(module, tokens, ids, guidance=None if guidance is None else guidance[:1])
        finally:
            self.reading = False


class _ReadingStep:
    """A step of one picture that reads its references, too: one pass instead of two shorter ones.

    Args:
        forward: of the transformer.
        given: its arguments, without references.

    Attributes:
        output: of the step, once it has been called.
    """

    def __init__(self, forward: Callable[..., Any], given: dict[str, Any]) -> None:
        self.forward, self.given = forward, given
        self.output: Any = None

    def __call__(self, tokens: torch.Tensor, ids: torch.Tensor) -> Flux2KVCache:
        """What was read of references `[1, tokens of all, channels]` at the positions `ids`."""
        given = self.given | {
            "hidden_states": torch.cat([tokens, self.given["hidden_states"]], 1),
            "img_ids": torch.cat([ids, self.given["img_ids"]]),
            "kv_cache_mode": "extract", "num_ref_tokens": tokens.shape[1], "return_dict": False,
        }  # fmt: skip
        sample, cache = self.forward(**given)
        whole = self.given.get("return_dict", True)
        self.output = Flux2Transformer2DModelOutput(sample=sample) if whole else (sample,)
        return cache


class WarmHook(ModelHook):
    """Every pass is given the same references, which are in none of them.

    Args:
        references: see `batched`.
        guidance: that the model was told with them, where it is told one.
        slots: see `batched`.
    """

    def __init__(
        self, references: Sequence[Entry], guidance: float | None = None, slots: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.references, self.guidance, self.slots = references, guidance, slots
        self.cache: tuple[int, Flux2KVCache] | None = None
        self.dtype: torch.dtype | None = None

    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        """See diffusers' `ModelHook`."""
        self.dtype = module.proj_out.weight.dtype
        return module

    def new_forward(self, module: Flux2Transformer2DModel, *args: Any, **kwargs: Any) -> Any:
        """A pass with them."""
        if isinstance(getattr(module, "_cache_config", None), FirstBlockCacheConfig):
            raise UserError(
                "diffusers' first-block cache fails on FLUX.2 transformers, with references and without: take another "
                "step cache, such as TaylorSeer, MagCache or pyramid attention broadcast."
            )
        given = arguments_of(module, args, kwargs)
        if bool((given["img_ids"][..., POSITION_OF_REFERENCES] != 0).any()) or given.get("kv_cache") is not None:
            raise UserError("References have been read before this request: give it no pictures.")
        if module.proj_out.weight.dtype != self.dtype:
            raise UserError(f"The references were read in {self.dtype}: read them anew with the model as it is now.")
        guiding = embedded(given.get("guidance"))
        if guiding != self.guidance:
            raise UserError(f"The references were read with a guidance of {self.guidance}: the request has {guiding}.")
        batch = given["hidden_states"].shape[0]
        if self.cache is None or self.cache[0] != batch:
            device = given["hidden_states"].device
            self.cache = batch, batched(module, [self.references], self.slots, batch, device)
        return self.fn_ref.original_forward(**given | cached(self.cache[1]))


def arguments_of(module: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of a pass, by name."""
    given = dict(_signature(type(module).forward).bind(module, *args, **kwargs).arguments)
    del given["self"]
    return given


@functools.cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def cached(cache: Flux2KVCache) -> dict[str, Any]:
    """What tells the transformer to take references from there."""
    return {"kv_cache": cache, "kv_cache_mode": "cached", "num_ref_tokens": 0}


def embedded(guidance: torch.Tensor | None) -> float | None:
    """The guidance that the model is told, which is one for all rows."""
    return None if guidance is None else float(guidance.flatten()[0])


def batched(
    module: Flux2Transformer2DModel,
    rows: Sequence[Sequence[Entry]],
    slots: Sequence[int] | None,
    batch: int,
    device: torch.device,
) -> Flux2KVCache:
    """As the transformer takes it: a single row serves the whole batch without a copy.

    Args:
        rows: of each, what was read: one entry of all references, or one of each.
        slots: places of the references on the first axis of positions, where each was read by itself.
        device: of the pass; an offloaded model's weights may lie elsewhere before it begins.
    """
    double = len(module.transformer_blocks)
    cache = Flux2KVCache(double, len(module.single_transformer_blocks))
    for index, layer in enumerate(layers(cache)):
        keys, values = [], []
        for row in rows:
            turns = [0] if slots is None else [slot - REFERENCE_DISTANCE for slot in slots]
            own = [unpack(part.keys[index]).to(device) for part in row]
            keys.append(_joined([moved(module, part, by) for part, by in zip(own, turns, strict=True)], 1))
            values.append(_joined([unpack(part.values[index]).to(device) for part in row], 1))
        layer.store(_joined(keys, 0).expand(batch, -1, -1, -1), _joined(values, 0).expand(batch, -1, -1, -1))
    cache.num_ref_tokens = cache.get_double(0).k_ref.shape[1] if double else cache.get_single(0).k_ref.shape[1]
    return cache


def _joined(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Without a copy where there is one alone: then what is at hand is what is stored."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _key(model: str, tokens: torch.Tensor, ids: torch.Tensor, guidance: float | None, storage: str) -> str:
    digest = hashlib.sha256(f"{model} {guidance} {storage} {tokens.dtype} {tuple(tokens.shape)}".encode())
    digest.update(tokens.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    digest.update(ids.cpu().long().numpy().tobytes())
    return digest.hexdigest()


def _shared(cache: Flux2KVCache) -> Flux2KVCache:
    """Another cache of the same tensors: pipelines empty theirs when a request ends."""
    other = Flux2KVCache(len(cache.double_block_caches), len(cache.single_block_caches))
    other.num_ref_tokens = cache.num_ref_tokens
    for layer, own in zip(layers(other), layers(cache), strict=True):
        layer.store(own.k_ref, own.v_ref)
    return other
