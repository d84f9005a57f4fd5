"""What else refines a coarse picture without training: the methods that the h-transform is compared with.

All draw square pictures with the editing model, and are used like `HTransform`, as a block around a call. Those that
need to know how the guide came about take that as `measure`, a function of pictures that PyTorch can differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from lissom.diffusion.demo.pipeline import PixelEditPipeline, from_tokens, to_tokens
from lissom.diffusion.sampling import Mix, around_steps, changed, mix_of, sample_of
from lissom.errors import UserError

Measure = Callable[[torch.Tensor], torch.Tensor]


def started(guide: torch.Tensor, noise: torch.Tensor, strength: float, steps: int) -> dict[str, Any]:
    """SDEdit (arXiv 2108.01073): arguments of a flow pipeline's call that begins at the noised guide.

    With fewer steps the higher noise levels are left out, which is what diffusers' img2img pipelines do: there
    `strength` of the steps remain.

    Args:
        guide, noise: as samples.
        strength: noise level at which it begins, above 0 to 1.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength={strength}: expected a noise level above 0, up to 1.")
    sigmas = torch.linspace(strength, strength / steps, steps, dtype=torch.float64).tolist()
    return {"latents": torch.lerp(guide, noise, strength), "sigmas": sigmas, "num_inference_steps": steps}


@dataclass(frozen=True)
class ILVR:
    """Behind every step the low frequencies are those of the noised guide (arXiv 2108.02938).

    Args:
        factor: what is kept of the guide is what is left when it is made so many times smaller.
        until: noise level from which on samples are left alone.
    """

    factor: int = 4
    until: float = 0.0

    @contextmanager
    def __call__(self, pipeline: PixelEditPipeline, guide: torch.Tensor, generator: torch.Generator) -> Iterator[None]:
        """Draw near `guide`, pictures `[batch, 3, height, width]`."""
        patch = pipeline.config.patch

        def low(pictures: torch.Tensor) -> torch.Tensor:
            small = F.interpolate(pictures, scale_factor=1 / self.factor, mode="bicubic", antialias=True)
            return F.interpolate(small, size=pictures.shape[2:], mode="bicubic")

        def keep(sample: torch.Tensor, mix: Mix) -> torch.Tensor:
            if mix.b < self.until:
                return sample
            noised = mix.a * guide + mix.b * torch.randn(guide.shape, generator=generator).to(guide)
            pictures = _pictures(sample, patch)
            return to_tokens(pictures + low(noised) - low(pictures), patch)

        with _behind(pipeline, keep):
            yield


@dataclass(frozen=True)
class Replacement:
    """Behind every step known pixels are those of the noised guide, as RePaint does in each step (arXiv 2201.09865).

    Args:
        until: noise level from which on samples are left alone.
    """

    until: float = 0.0

    @contextmanager
    def __call__(
        self, pipeline: PixelEditPipeline, guide: torch.Tensor, known: torch.Tensor, generator: torch.Generator
    ) -> Iterator[None]:
        """Draw what `guide` has where `known` is 1, `[batch, 1, height, width]`."""
        patch = pipeline.config.patch

        def keep(sample: torch.Tensor, mix: Mix) -> torch.Tensor:
            if mix.b < self.until:
                return sample
            noised = mix.a * guide + mix.b * torch.randn(guide.shape, generator=generator).to(guide)
            return to_tokens(torch.where(known > 0, noised, _pictures(sample, patch)), patch)

        with _behind(pipeline, keep):
            yield


@dataclass(frozen=True)
class FlowDPS:
    """Data consistency by gradients through the measurement alone, with fresh noise in every step (arXiv 2503.08136).

    Args:
        rate: of each gradient step of the squared distance, 1 the largest that no direction diverges with or swings.
        iterations: gradient steps in a step.
    """

    rate: float = 0.5
    iterations: int = 3

    @contextmanager
    def __call__(
        self, pipeline: PixelEditPipeline, measured: torch.Tensor, measure: Measure, generator: torch.Generator
    ) -> Iterator[None]:
        """Draw what measures as `measured`."""
        scheduler, patch, rate = pipeline.scheduler, pipeline.config.patch, None

        def step(own: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
            nonlocal rate
            mix = mix_of(scheduler, timestep)
            later = _next(scheduler)
            clean = mix.clean(sample, output)
            noise = mix.noise(sample, clean)
            pictures = _pictures(clean, patch)
            rate = rate or self.rate / _largest(measure, pictures)
            for _ in range(self.iterations):
                pictures = pictures - rate * _slope(pictures, measured, measure)
            clean = torch.lerp(clean, to_tokens(pictures, patch), mix.b)
            fresh = torch.randn(clean.shape, generator=generator).to(clean)
            noise = later.b**0.5 * noise + (1 - later.b) ** 0.5 * fresh
            return changed(own(output, timestep, sample), later.a * clean + later.b * noise)

        with around_steps(scheduler, step):
            yield


@dataclass(frozen=True)
class DPS:
    """Every step is followed by one down the slope of the distance to the measurement, through the model (arXiv
    2209.14687): it costs a pass and its gradient more.

    Args:
        rate: of the slope of the distance, as in the paper not squared.
    """

    rate: float = 0.5

    @contextmanager
    def __call__(self, pipeline: PixelEditPipeline, measured: torch.Tensor, measure: Measure) -> Iterator[None]:
        """Draw what measures as `measured`; without guidance, whose two passes it does not follow."""
        scheduler, transformer, patch = pipeline.scheduler, pipeline.transformer, pipeline.config.patch
        given: dict[str, Any] = {}

        def keep(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():
                given.update(kwargs)

        def step(own: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
            mix = mix_of(scheduler, timestep)
            with torch.enable_grad():
                asked = sample.detach().requires_grad_()
                rest = given["hidden_states"][:, : -sample.shape[1]]
                inputs = given | {"hidden_states": torch.cat([rest, asked.to(rest)], 1)}
                again = transformer(**inputs)[0][:, -sample.shape[1] :]
                clean = mix.clean(asked, again)
                pictures = _pictures(clean, patch)
                distance = (measured - measure(pictures)).flatten(1).norm(dim=1).sum()
                (slope,) = torch.autograd.grad(distance, asked)
            result = own(output, timestep, sample)
            return changed(result, sample_of(result) - self.rate * slope.to(sample))

        handle = transformer.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with around_steps(scheduler, step):
                yield
        finally:
            handle.remove()


def _pictures(sample: torch.Tensor, patch: int) -> torch.Tensor:
    """Tokens of square pictures as pictures, in fp32."""
    side = round(sample.shape[1] ** 0.5)
    return from_tokens(sample.float(), side, side, patch)


@contextmanager
def _behind(pipeline: DiffusionPipeline, keep: Callable[[torch.Tensor, Mix], torch.Tensor]) -> Iterator[None]:
    """Behind every step the sample is `keep(sample, mix)`, with the mix that it has there."""
    scheduler = pipeline.scheduler

    def step(own: Any, output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
        mix_of(scheduler, timestep)  # lets the scheduler find its place
        later = _next(scheduler)
        result = own(output, timestep, sample)
        return changed(result, keep(sample_of(result), later).to(sample.dtype))

    with around_steps(scheduler, step):
        yield


def _next(scheduler: Any) -> Mix:
    """The mix behind the step that comes next, in a flow."""
    sigma = float(scheduler.sigmas[scheduler.step_index + 1])
    return Mix(1 - sigma, sigma, 1.0, -sigma)


def _largest(measure: Measure, pictures: torch.Tensor) -> float:
    """Largest eigenvalue of `measure` and back, by power iteration; it is taken for linear."""
    direction = torch.randn(pictures[:1].shape, generator=torch.Generator().manual_seed(0)).to(pictures)
    value = 1.0
    for _ in range(30):
        direction = direction / direction.norm()
        turned = _slope(direction, torch.zeros_like(measure(direction)), measure)
        value, direction = float(turned.norm()), turned
    return value


def _slope(pictures: torch.Tensor, measured: torch.Tensor, measure: Measure) -> torch.Tensor:
    """Of half the squared distance."""
    with torch.enable_grad():
        asked = pictures.detach().requires_grad_()
        distance = (measured - measure(asked)).square().sum() / 2
        (slope,) = torch.autograd.grad(distance, asked)
    return slope
