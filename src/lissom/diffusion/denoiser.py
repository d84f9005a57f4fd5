"""The network of a pipeline that is run in every step, and by what it is known again."""

from __future__ import annotations

import hashlib
import json

import torch
from diffusers import DiffusionPipeline

from lissom.errors import UserError


def denoiser(pipeline: DiffusionPipeline) -> torch.nn.Module:
    """The transformer or UNet.

    Raises:
        UserError: there is none.
    """
    for name in ("transformer", "unet"):
        if isinstance(found := getattr(pipeline, name, None), torch.nn.Module):
            return found
    raise UserError(f"{type(pipeline).__name__} has neither a transformer nor a UNet.")


def fingerprint(network: torch.nn.Module) -> str:
    """Of a network's config, a part of each of its weights, and the strengths of its adapters; others have another one.

    It is made when a block begins: a model that is changed within the block is not seen to be.
    """
    facts = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}  # not its folder
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, module in network.named_modules():
        if scaling := getattr(module, "scaling", None):  # of adapters that are on
            digest.update(f"{name} {scaling} {getattr(module, 'active_adapters', None)}".encode())
    for name, parameter in network.named_parameters():
        part = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + part.numpy().tobytes())
    return digest.hexdigest()
