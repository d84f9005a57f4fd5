"""Weighted h-transform: a coarse picture is refined by a diffusion model that was not trained for it.

Doob's h-transform would steer sampling to pictures whose fine version is known; the coarse guide stands in for it. That
is the more wrong the finer the details that a step decides, so the pull to the guide is weighted by a power of the
noise level. In every step the clean picture that the model means is moved towards the guide, `x₀ + λ (y − x₀)`, and the
sampler takes its own step from there. How the guide came about is not needed (arXiv 2603.12057).
"""

from lissom.diffusion.h_transform.apply import HTransform

__all__ = ["HTransform"]
