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


def own_size(pipeline: DiffusionPipeline) -> tuple[int, int] | None:
    """Width and height of what a pipeline draws that cannot be told; None: it can, or they are not known."""
    if takes(pipeline, "height") or any(hasattr(pipeline, name) for name in ("vae", "vqvae", "movq")):
        return None  # where there is an autoencoder networks know the sizes of latents
    size = getattr(denoiser(pipeline).config, "sample_size", None)
    if isinstance(size, list | tuple):
        return size[1], size[0]
    return None if size is None else (size, size)


def arguments(pipeline: DiffusionPipeline, **options: Any) -> dict[str, Any]:
    """Those of `options` that are not None, for the call of a pipeline.

    Raises:
        UserError: it does not take one, or needs another, or a size is not what it draws.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    name = type(pipeline).__name__
    given = {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - known.keys():
        size = own_size(pipeline)
        if option in _NOTHING and given[option] == _NOTHING[option]:
            del given[option]
        elif option in ("width", "height") and size is not None:
            if given.pop(option) != size[option == "height"]:
                raise UserError(f"{name} draws pictures of {size[0]} by {size[1]} pixels alone.")
        else:
            raise UserError(f"{name} takes no {option}.")
    for option, parameter in list(known.items())[1:]:
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if named and parameter.default is parameter.empty and option not in given:
            raise UserError(f"{name} needs {option}, which is not given.")
    return given
