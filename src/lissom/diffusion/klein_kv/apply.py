"""Klein KV inside a pipeline of diffusers: references are read once, and enter no other pass of the transformer."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux2KleinKVPipeline, Flux2Transformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache, Flux2Transformer2DModelOutput

from lissom.diffusion.klein_kv.store import STORAGES, Entry, ReferenceStore, Storage, pack, unpack
from lissom.diffusion.references import POSITION_OF_REFERENCES, layers, prepare, read
from lissom.errors import UserError

_HOOK = "lissom_klein_kv"
_RECENT = 8  # references that are at hand as the transformer takes them: those of a request


@dataclass
class KleinKVReport:
    """What happened while the cache was on.

    Attributes:
        reference_passes: passes over references.
        cached_passes: passes of the transformer that took references from the cache.
        damage: where it was forced on a model that was not trained for it: relative distance of its first output to
            that of the model without the cache.
        store: what is held, with its hits and misses.
    """

    store: ReferenceStore
    reference_passes: int = 0
    cached_passes: int = 0
    damage: float | None = None


@dataclass(frozen=True)
class KleinKV:
    """Keys and values of reference tokens are computed once and used in every step, of this request and of later ones.

    It is exact for models that were trained with references that see neither noise nor text nor time (FLUX.2 klein KV;
    `PixelEditPipeline` with `references` of `set` or `each`). Any other is refused.

    Args:
        limit: bytes of references that are kept for later requests.
        storage: `model`: as the model computes them; `int8`: a scale for each token and head.
        store: where they are kept; one may serve several pipelines. Default: one of `limit` bytes for each entering.
        force: use it on a model that was not trained for it, too. The report says what that does to the first output.
    """

    limit: int = 2**30
    storage: Storage = "model"
    store: ReferenceStore | None = field(default=None, compare=False)
    force: bool = False

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise UserError(f"storage={self.storage!r}: expected one of {', '.join(STORAGES)}.")
        if self.store is None:
            ReferenceStore(self.limit)

    @contextmanager
    def __call__(self, pipeline: DiffusionPipeline) -> Iterator[KleinKVReport]:
        """Use it in `pipeline` until the block ends, which leaves the pipeline as it was.

        Raises:
            UserError: the pipeline is of another family, or its model was not trained for it.
        """
        transformer = getattr(pipeline, "transformer", None)
        if not isinstance(transformer, Flux2Transformer2DModel):
            raise UserError(
                f"{type(pipeline).__name__} has no FLUX.2 transformer: Klein KV caches the references of that family."
            )
        trained = references_of(pipeline)
        if trained == "joint" and not self.force:
            raise UserError(
                "The model's references see noise and text, so their keys and values are others in every step: take a "
                "model that was trained for the cache, or give force=True to see what that costs."
            )
        report = KleinKVReport(ReferenceStore(self.limit) if self.store is None else self.store)
        registry = HookRegistry.check_if_exists_or_initialize(transformer)
        if registry.get_hook(_HOOK) is not None:
            raise UserError("Klein KV is on in this pipeline already.")
        processors = transformer.attn_processors
        prepare(transformer)
        hook = _ReferenceHook(self, report, fingerprint(transformer), trained)
        registry.register_hook(hook, _HOOK)
        try:
            yield report
        finally:
            registry.remove_hook(_HOOK, recurse=False)
            transformer.set_attn_processor(processors)


def references_of(pipeline: DiffusionPipeline) -> str:
    """What references see in the model of a pipeline, as it was trained: `joint`, `set` or `each`."""
    if isinstance(pipeline, Flux2KleinKVPipeline):
        return "set"
    return str(pipeline.config.get("references", "joint"))


def fingerprint(transformer: torch.nn.Module) -> str:
    """Of a model's config and a part of each of its weights: other weights have another one."""
    digest = hashlib.sha256(json.dumps(dict(transformer.config), sort_keys=True, default=str).encode())
    for name, parameter in transformer.named_parameters():
        part = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + part.numpy().tobytes())
    return digest.hexdigest()


class _ReferenceHook(ModelHook):
    """Takes reference tokens out of the transformer's inputs and gives it their keys and values instead."""

    def __init__(self, method: KleinKV, report: KleinKVReport, model: str, trained: str) -> None:
        super().__init__()
        self.method, self.report, self.model, self.trained = method, report, model, trained
        self.reading = False
        self.recent: list[tuple[torch.Tensor, torch.Tensor, Any, Flux2KVCache]] = []

    def new_forward(self, module: Flux2Transformer2DModel, *args: Any, **kwargs: Any) -> Any:
        """A pass without reference tokens where there were some."""
        forward = self.fn_ref.original_forward
        if self.reading:
            return forward(*args, **kwargs)
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given.pop("self")
        ids = given["img_ids"][0] if given["img_ids"].ndim == 3 else given["img_ids"]
        references = ids[:, POSITION_OF_REFERENCES] != 0
        if given.get("kv_cache") is not None or not references.any():
            self.report.cached_passes += given.get("kv_cache") is not None
            return forward(**given)
        hidden = given["hidden_states"]
        cache = self._cache(module, hidden[:, references], ids[references], given.get("guidance"))
        asked = given.get("kv_cache_mode") == "extract"
        if asked and references.all():  # a pipeline that reads them by itself
            return hidden[:, :0], _shared(cache)
        changed = given | {
            "hidden_states": hidden[:, ~references],
            "img_ids": ids[~references],
            "kv_cache": cache,
            "kv_cache_mode": "cached",
            "num_ref_tokens": 0,
        }
        output = forward(**changed)
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
        self, module: Flux2Transformer2DModel, tokens: torch.Tensor, ids: torch.Tensor, guidance: torch.Tensor | None
    ) -> Flux2KVCache:
        """Keys and values of the references of every row of the batch."""
        guiding = None if guidance is None else guidance.flatten()[:1].tolist()
        for known, places, known_guidance, cache in self.recent:
            if guiding == known_guidance and torch.equal(places, ids) and torch.equal(known, tokens):
                return cache
        rows = tokens[:1] if bool((tokens == tokens[:1]).all()) else tokens
        found = [self._row(module, row[None], ids, guidance, guiding) for row in rows]
        cache = _batched(found, tokens.shape[0], len(module.transformer_blocks))
        self.recent = [*self.recent[1 - _RECENT :], (tokens, ids, guiding, cache)]
        return cache

    def _row(
        self,
        module: Flux2Transformer2DModel,
        tokens: torch.Tensor,
        ids: torch.Tensor,
        guidance: torch.Tensor | None,
        guiding: Any,
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of each block for one row, from the store where it has them."""
        lengths = ids[:, POSITION_OF_REFERENCES].unique_consecutive(return_counts=True)[1].tolist()
        parts = lengths if self.trained == "each" else [len(ids)]
        found: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        for part, places in zip(tokens.split(parts, 1), ids.split(parts), strict=True):
            key = _key(self.model, part, places, guiding, self.method.storage)
            entry = self.report.store.get(key)
            if entry is None:
                cache = self._read(module, part, places, guidance)
                self.report.reference_passes += 1
                entry = Entry(
                    tuple(pack(layer.k_ref, self.method.storage) for layer in layers(cache)),
                    tuple(pack(layer.v_ref, self.method.storage) for layer in layers(cache)),
                )
                self.report.store.put(key, entry)
            found.append([(unpack(k), unpack(v)) for k, v in zip(entry.keys, entry.values, strict=True)])
        return [
            (torch.cat([k for k, _ in own], 1), torch.cat([v for _, v in own], 1)) for own in zip(*found, strict=True)
        ]

    def _read(
        self, module: Flux2Transformer2DModel, tokens: torch.Tensor, ids: torch.Tensor, guidance: torch.Tensor | None
    ) -> Flux2KVCache:
        """By a pass of the same transformer, which is not this hook's business."""
        self.reading = True
        try:
            return read(module, tokens, ids, guidance=None if guidance is None else guidance[:1])
        finally:
            self.reading = False


def _key(model: str, tokens: torch.Tensor, ids: torch.Tensor, guiding: Any, storage: str) -> str:
    digest = hashlib.sha256(f"{model} {guiding} {storage} {tokens.dtype} {tuple(tokens.shape)}".encode())
    digest.update(tokens.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    digest.update(ids.cpu().long().numpy().tobytes())
    return digest.hexdigest()


def _batched(rows: Sequence[list[tuple[torch.Tensor, torch.Tensor]]], batch: int, double: int) -> Flux2KVCache:
    """As the transformer takes it: a single row serves the whole batch without a copy."""
    cache = Flux2KVCache(double, len(rows[0]) - double)
    for layer, *own in zip(layers(cache), *rows, strict=True):
        keys, values = (torch.cat([pair[side] for pair in own]).expand(batch, -1, -1, -1) for side in (0, 1))
        layer.store(keys, values)
    cache.num_ref_tokens = rows[0][0][0].shape[1]
    return cache


def _shared(cache: Flux2KVCache) -> Flux2KVCache:
    """Another cache of the same tensors: pipelines empty theirs when a request ends."""
    other = Flux2KVCache(len(cache.double_block_caches), len(cache.single_block_caches))
    other.num_ref_tokens = cache.num_ref_tokens
    for layer, own in zip(layers(other), layers(cache), strict=True):
        layer.store(own.k_ref, own.v_ref)
    return other
