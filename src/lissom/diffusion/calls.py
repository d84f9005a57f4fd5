"""Calls of pipelines that one does not know: each takes other arguments."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DiffusionPipeline

from lissom.diffusion.denoiser import denoiser
from lissom.errors import UserError

_NOTHING = {"prompt": "", "num_images_per_prompt": 1}  # what is the same as not to give it


def takes(pipeline: DiffusionPipeline, name: str) -> bool:
    """Whether the call of a pipeline has an argument of that name."""
    return name in inspect.signature(type(pipeline).__call__).parameters


def own_steps(pipeline: DiffusionPipeline) -> int:
    """Steps that a pipeline takes where nothing is said.

    Raises:
        UserError: it has no number of steps.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    if "num_inference_steps" not in known:
        raise UserError(f"{type(pipeline).__name__} does not draw in steps.")
    return int(known["num_inference_steps"].default)


def arguments(pipeline: DiffusionPipeline, **options: Any) -> dict[str, Any]:
    """Those of `options` that are not None, for the call of a pipeline.

    Raises:
        UserError: it does not take one, or a size that it does not draw.
    """
    given = {name: value for name, value in options.items() if value is not None}
    unknown = [name for name in given if not takes(pipeline, name)]
    for name in unknown:
        if name in _NOTHING and given[name] == _NOTHING[name]:
            del given[name]
        elif name in ("height", "width"):  # draws pictures of one size
            side = getattr(denoiser(pipeline).config, "sample_size", None)
            size = dict(zip(("height", "width"), side if isinstance(side, list | tuple) else (side, side), strict=True))
            if given.pop(name) != size[name]:
                raise UserError(
                    f"{type(pipeline).__name__} draws pictures of {size['width']} by {size['height']} pixels alone."
                )
        else:
            raise UserError(f"{type(pipeline).__name__} takes no {name}.")
    return given
