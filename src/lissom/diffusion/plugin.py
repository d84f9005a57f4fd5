"""Makes lissom's pipeline known to `DiffusionPipeline.from_pretrained`, which looks for it in diffusers itself."""

from __future__ import annotations

from contextlib import suppress

with suppress(ImportError):  # a diffusers without FLUX.2 has no use for it
    import lissom.diffusion.demo.pipeline  # noqa: F401
