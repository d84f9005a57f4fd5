"""References that were read before there was a request: kept by the caller, in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel

from lissom.diffusion.denoiser import fingerprint
from lissom.diffusion.klein_kv.hooks import WarmHook, hooked
from lissom.diffusion.klein_kv.store import Entry, Packed
from lissom.diffusion.references import reference_numbers
from lissom.errors import UserError
from lissom.sealed import Sealed

_FILE = Sealed("lissom-warm-references", 1, "file of references", "Read the references again.")


@dataclass(frozen=True)
class WarmReferences:
    """References with their keys and values: requests within `with references(pipeline):` draw with them.

    Such requests are given no pictures. Every step is without reference tokens, the first one included, so that all
    have one length, which step caches and `torch.compile` need.

    Args:
        model: fingerprint of the model that read them.
        trained: what references see in it, `set` or `each` (or `joint`, where that was forced).
        parts: one entry of all, or where each sees only itself one of each, as if it were the first.
        guidance: that the model was told with them, where it is told one.
    """

    model: str
    trained: str
    parts: tuple[Entry, ...] = field(repr=False)
    guidance: float | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(part.nbytes for part in self.parts)

    @property
    def tokens(self) -> int:
        """Of all references."""
        return sum(part.tokens for part in self.parts)

    @contextmanager
    def __call__(self, pipeline: DiffusionPipeline) -> Iterator[None]:
        """Draw with these references until the block ends, which leaves the pipeline as it was.

        Raises:
            UserError: they belong to another model.
        """
        transformer = transformer_of(pipeline)
        if fingerprint(transformer) != self.model:
            raise UserError("The references were read by another model: read them with this one.")
        slots = reference_numbers(len(self.parts)) if self.trained == "each" else None
        with hooked(transformer, WarmHook(self.parts, self.guidance, slots)):
            yield

    def __add__(self, other: WarmReferences) -> WarmReferences:
        """These and then `other`, of a model in which each reference sees only itself.

        Raises:
            UserError: of another kind of model, or of two.
        """
        if self.trained != "each":
            raise UserError("References of this model see each other: read them together.")
        if (self.model, self.guidance) != (other.model, other.guidance):
            raise UserError("The references were read by different models.")
        return replace(self, parts=self.parts + other.parts)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file, atomically."""
        tensors, dtypes = {}, []
        for part, entry in enumerate(self.parts):
            for side, blocks in (("key", entry.keys), ("value", entry.values)):
                for index, packed in enumerate(blocks):
                    tensors[f"{part}.{index}.{side}"] = packed.values
                    if packed.scales is not None:
                        tensors[f"{part}.{index}.{side}.scale"] = packed.scales
            dtypes.append(str(entry.keys[0].dtype).removeprefix("torch."))
        _FILE.save(file, {
            "model": self.model, "trained": self.trained, "guidance": self.guidance, "dtypes": dtypes,
            "blocks": len(self.parts[0].keys),
        }, tensors)  # fmt: skip

    @classmethod
    def load(cls, file: str | Path) -> WarmReferences:
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, it is damaged, or it is another one.
        """
        header, tensors = _FILE.load(file)
        try:
            parts = tuple(
                Entry(*(_blocks(tensors, part, header["blocks"], side, dtype) for side in ("key", "value")))
                for part, dtype in enumerate(header["dtypes"])
            )
            return cls(header["model"], header["trained"], parts, header["guidance"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {error}. Read the references again.") from error


def transformer_of(pipeline: DiffusionPipeline) -> Flux2Transformer2DModel:
    """What draws in a pipeline.

    Raises:
        UserError: it is of another family.
    """
    transformer = getattr(pipeline, "transformer", None)
    if not isinstance(transformer, Flux2Transformer2DModel):
        raise UserError(
            f"{type(pipeline).__name__} has no FLUX.2 transformer: Klein KV is exact for that family alone; "
            "KleinKV(mode='approximate') takes FLUX.1 and Qwen-Image."
        )
    return transformer


def _blocks(tensors: dict[str, torch.Tensor], part: int, blocks: int, side: str, dtype: str) -> tuple[Packed, ...]:
    names = [f"{part}.{index}.{side}" for index in range(blocks)]
    return tuple(Packed(tensors[name], tensors.get(f"{name}.scale"), getattr(torch, dtype)) for name in names)
