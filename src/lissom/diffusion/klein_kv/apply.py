"""Klein KV inside a pipeline of diffusers: references are read once, and enter no other pass of the transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import DiffusionPipeline, Flux2KleinKVPipeline, Flux2Transformer2DModel
from pydantic import InstanceOf

from lissom.diffusion.calls import takes
from lissom.diffusion.denoiser import fingerprint
from lissom.diffusion.klein_kv.approximate import FAMILIES, ApproximateHook
from lissom.diffusion.klein_kv.hooks import KleinKVReport, ReferenceHook, hooked
from lissom.diffusion.klein_kv.store import ReferenceStore, Storage
from lissom.diffusion.klein_kv.warm import WarmReferences, transformer_of
from lissom.diffusion.pictures import quiet
from lissom.errors import UserError
from lissom.models.method import check_types, described

_SMALL = 64  # pixels of a side of what is drawn where only references are wanted


@dataclass(frozen=True)
class KleinKV:
    """Keys and values of reference tokens are computed once and used in every step, of this request and of later ones.

    It is exact for models that were trained with references that see neither noise nor text nor time (FLUX.2 klein KV;
    `PixelEditPipeline` with `references` of `set` or `each`). Any other is refused, unless an approximation is asked
    for: then what a whole pass left of the references (FLUX.1 Kontext, Qwen-Image-Edit) is used in the next passes.

    Args:
        mode: `exact`, or `approximate`, for models that were not trained for it, and not for FLUX.2's.
        refresh_every: passes of which one is whole, in the approximation; None: the first alone.
        limit: bytes of references that are kept for later requests, or text such as '64MB'; those of the one at hand
            lie beside them, as the model takes them.
        storage: `model`: as the model computes them; `int8` or `fp8`, with a scale for each token and head.
        store: where they are kept; one may serve several pipelines. Default: one of `limit` bytes for each entering.
        force: use it on a model that was not trained for it, too. The report says what that does to the first output.
    """

    name: ClassVar[str] = "klein-kv"
    inputs: ClassVar[tuple[str, ...]] = ()

    mode: Literal["exact", "approximate"] = "exact"
    refresh_every: int | None = None
    limit: int | str = "4GiB"
    storage: Storage = "model"
    store: InstanceOf[ReferenceStore] | None = field(default=None, compare=False)
    force: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.mode == "approximate" and (self.storage != "model" or self.store is not None or self.force):
            raise UserError("An approximation keeps nothing for later: leave out storage, store and force.")
        if self.refresh_every is not None and (self.mode == "exact" or self.refresh_every < 2):
            raise UserError(f"refresh_every={self.refresh_every}: expected 2 or more, with mode='approximate'.")
        if self.store is None:
            ReferenceStore(self.limit)
        elif self.limit != type(self).limit:
            raise UserError(f"The store holds {self.store.limit} bytes: leave out limit={self.limit}.")

    def __str__(self) -> str:
        return described(self, self.name)

    @classmethod
    def candidates(cls, pipeline: DiffusionPipeline, quick: bool = False) -> Sequence[Self]:
        """See `lissom.models.method.PipelineMethod`."""
        transformer = getattr(pipeline, "transformer", None)
        if isinstance(transformer, Flux2Transformer2DModel) and references_of(pipeline) != "joint":
            return [cls(), cls(storage="int8")]
        if isinstance(transformer, tuple(FAMILIES)):
            return [cls(mode="approximate"), cls(mode="approximate", refresh_every=3)]
        return []

    @contextmanager
    def __call__(self, pipeline: DiffusionPipeline) -> Iterator[KleinKVReport]:
        """Use it in `pipeline` until the block ends, which leaves the pipeline as it was.

        Raises:
            UserError: the pipeline is of another family, or its model was not trained for it.
        """
        if self.mode == "approximate":
            with self._approximate(pipeline) as report:
                yield report
            return
        transformer = transformer_of(pipeline)
        hook = self._hook(pipeline, transformer)
        with hooked(transformer, hook):
            yield hook.report

    @contextmanager
    def _approximate(self, pipeline: DiffusionPipeline) -> Iterator[KleinKVReport]:
        transformer = getattr(pipeline, "transformer", None)
        family = next((own for kind, own in FAMILIES.items() if isinstance(transformer, kind)), None)
        if family is None:
            names = " or ".join(kind.__name__ for kind in FAMILIES)
            raise UserError(f"{type(pipeline).__name__} has no {names}, which can be approximated.")
        report = KleinKVReport(ReferenceStore(self.limit))
        with hooked(transformer, ApproximateHook(report, family, self.refresh_every)):
            yield report

    def prefill(self, pipeline: DiffusionPipeline, image: Any, **options: Any) -> WarmReferences:
        """Read references before there is a request: what is returned serves every later one, from its first step on.

        Args:
            image: references, as `pipeline` takes them.
            options: of its call; where the model is told the guidance, `guidance_scale` must be that of the requests.

        Raises:
            UserError: the pipeline or its model cannot, or there is no reference.
        """
        if self.mode == "approximate":
            raise UserError(
                "An approximation needs noise and text: it cannot read references before there is a request."
            )
        transformer = transformer_of(pipeline)
        hook = replace(self, limit=type(self).limit, store=ReferenceStore(2**61))._hook(pipeline, transformer)
        words = torch.zeros(1, 1, transformer.config.joint_attention_dim, dtype=transformer.dtype)
        side = pipeline.config.get("size", _SMALL)
        call = {"prompt_embeds": words.to(pipeline._execution_device), "height": side, "width": side} | options
        if not transformer.config.guidance_embeds and takes(pipeline, "guidance_scale"):
            call["guidance_scale"] = 1.0  # one pass, without a negative prompt
        with hooked(transformer, hook), quiet(pipeline):
            pipeline(image=image, num_inference_steps=1, output_type="latent", **call)
        if not hook.found:
            raise UserError("There is no reference to read: give one picture at least.")
        parts = tuple(entry for _, row in sorted(hook.found.items()) for entry in row)
        return WarmReferences(hook.model, hook.trained, parts, hook.guidance)

    def _hook(self, pipeline: DiffusionPipeline, transformer: Flux2Transformer2DModel) -> ReferenceHook:
        trained = references_of(pipeline)
        if trained == "joint" and not self.force:
            raise UserError(
                "The model's references see noise and text, so their keys and values are others in every step: take a "
                "model that was trained for the cache, or force it (force=True, --cache force) to see what that costs."
            )
        store = ReferenceStore(self.limit) if self.store is None else self.store
        return ReferenceHook(KleinKVReport(store), self.storage, fingerprint(transformer), trained)


def references_of(pipeline: DiffusionPipeline) -> str:
    """What references see in the model of a pipeline, as it was trained: `joint`, `set` or `each`."""
    if isinstance(pipeline, Flux2KleinKVPipeline):
        return "set"
    return str(pipeline.config.get("references", "joint"))
