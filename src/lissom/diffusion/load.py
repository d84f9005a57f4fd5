"""Pipelines of diffusers from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from lissom.errors import UserError


def load_pipeline(name: str, dtype: str = "float32") -> DiffusionPipeline:
    """A pipeline with its weights, on the accelerator where there is one.

    Args:
        name: folder that `save_pretrained` or `lissom train-dit` wrote, or Hub id.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.

    Raises:
        UserError: there is no such pipeline, or it is damaged.
    """
    folder = Path(name)
    if folder.exists() and not (folder / "model_index.json").is_file():
        begun = " A run of `lissom train-dit` is there that has not ended." if (folder / "checkpoints").exists() else ""
        raise UserError(f"{name} is no pipeline of diffusers: it has no model_index.json.{begun}")
    if not folder.exists() and name.count("/") != 1:
        raise UserError(f"There is no folder {name}, and Hub ids are OWNER/NAME.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={dtype!r}: expected float32, bfloat16 or float16.")
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, dtype=getattr(torch, dtype))
    except Exception as error:  # diffusers raises what any of its parts does
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be loaded as a pipeline of diffusers: {reason}") from error
    return accelerated(pipeline)


def accelerated(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline on the accelerator, where there is one."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return pipeline if device is None else pipeline.to(device)
