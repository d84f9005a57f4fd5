"""Makes lissom's pipelines known to `DiffusionPipeline.from_pretrained`, which looks for them in diffusers itself."""

from __future__ import annotations

import diffusers

from lissom.diffusion.demo.pipeline import PixelEditPipeline

diffusers.PixelEditPipeline = PixelEditPipeline
