"""The weighted h-transform in a pipeline of diffusers, by its scheduler's steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from lissom.diffusion.h_transform.guide import Guide, region, to_sample
from lissom.diffusion.h_transform.weights import Level, noise_level, pulled, weight
from lissom.diffusion.pictures import to_pixels
from lissom.diffusion.sampling import around_steps, mix_of
from lissom.errors import UserError
from lissom.models.method import check_types, described


@dataclass(frozen=True)
class HTransform:
    """Pictures near a coarse guide, from a model that was not trained for it.

    In every step the clean picture that the model means is moved to the guide by the noise level to the power of alpha.

    Args:
        alpha: from 0, which gives the guide itself; the higher, the freer. The paper has 5 for images (`vp`), and 16 to
            20 for a flow model of videos (`flow`).
        level: which noise level: `vp` or `flow`, see `weights.noise_level`. The same alpha is far freer in `flow`.
        outside: alpha where a mask is black; infinite, the default, leaves that free.
    """

    name: ClassVar[str] = "h-transform"
    inputs: ClassVar[tuple[str, ...]] = ("guide", "mask")

    alpha: float = 5.0
    level: Level = "vp"
    outside: float = float("inf")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("alpha", "outside"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: expected a number from 0.")

    def __str__(self) -> str:
        return described(self, self.name)

    @classmethod
    def candidates(cls, pipeline: DiffusionPipeline, quick: bool = False) -> Sequence[Self]:
        """See `lissom.models.method.PipelineMethod`."""
        return [cls()]

    @contextmanager
    def __call__(
        self, pipeline: DiffusionPipeline, guide: Guide | None, mask: Image.Image | None = None
    ) -> Iterator[None]:
        """Draw near `guide` in `pipeline` until the block ends, which leaves the pipeline as it was.

        Guidance by a negative prompt comes before: what is moved is what the pipeline hands to its scheduler.

        Args:
            guide: of the size that is drawn: a picture, one for each picture that is drawn, or latents.
            mask: white where `alpha` holds, black where `outside` does. None: `alpha` everywhere.

        Raises:
            UserError: there is no guide, guide or mask do not fit, or the scheduler's noise level is not known.
        """
        if guide is None:
            raise UserError("There is no guide to draw near to: give a picture, as `lissom refine` does.")
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is None:
            raise UserError(f"{type(pipeline).__name__} has no scheduler.")
        for picture in [guide] if isinstance(guide, Image.Image) else []:
            pixels = to_pixels(picture)
            if mask is None and bool((pixels == pixels[:, :1, :1]).all()):
                raise UserError("The guide has one colour everywhere: there is nothing to refine.")
            if isinstance(mask, Image.Image) and mask.size != picture.size:
                sizes = " does not fit a guide of ".join(f"{own.width} by {own.height}" for own in (mask, picture))
                raise UserError(f"A mask of {sizes} pixels.")
        known: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}

        def step(own: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
            if sample.shape not in known:
                known[sample.shape] = to_sample(pipeline, guide, sample), self._alphas(pipeline, mask, sample)
            wanted, alphas = known[sample.shape]
            mix = mix_of(scheduler, timestep)
            if mix.d == 0:  # there is no noise left
                return own(output, timestep, sample)
            channels = sample.shape[1] if sample.ndim == 4 else output.shape[1]
            meant, variance = output[:, :channels], output[:, channels:]  # some models predict a variance, too
            clean = mix.clean(sample, meant)
            moved = pulled(clean, wanted, weight(noise_level(mix.a, mix.b, self.level), alphas))
            meant = (meant.float() + (moved - clean) / mix.d).to(output.dtype)
            return own(torch.cat([meant, variance], 1), timestep, sample)

        with around_steps(scheduler, step):
            yield

    def _alphas(self, pipeline: DiffusionPipeline, mask: Image.Image | None, sample: torch.Tensor) -> torch.Tensor:
        """Of each entry, where `mask` covers at least half of it or not."""
        if mask is None:
            return torch.full((1,) * sample.ndim, self.alpha, device=sample.device)
        covered = region(pipeline, mask, sample) >= 0.5
        return torch.where(covered, self.alpha, self.outside)
