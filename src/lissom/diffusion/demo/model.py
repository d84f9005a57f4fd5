"""The editing model in training: transformer and words together, and what is minimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from lissom.diffusion.demo.emoji import Emoji
from lissom.diffusion.demo.pipeline import PixelEditPipeline, positions, reference_tokens, text_positions, to_tokens
from lissom.diffusion.demo.task import EDITS, Batch
from lissom.diffusion.demo.words import WordTable, word_tokenizer
from lissom.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of a new model.

    Attributes:
        size: pixels of a side of the pictures that it is trained on.
        patch: pixels of a side of a token.
        width: of the hidden states, a multiple of `head`.
        head: entries of an attention head, a multiple of 8: a quarter for each axis of positions.
        double, single: blocks in which text has weights of its own, and in which all tokens share them.
        references: what they see, see `PixelEditPipeline`.
    """

    size: int = 32
    patch: int = 4
    width: int = 256
    head: int = 32
    double: int = 2
    single: int = 5
    references: str = "set"

    def __post_init__(self) -> None:
        if min(self.patch, self.width, self.head, self.double + self.single) < 1 or self.head % 8:
            raise UserError(f"{self}: expected sizes from 1, and heads of a multiple of 8.")
        if self.width % self.head or self.size % self.patch:
            raise UserError(f"{self}: heads must divide the width, and patches the picture.")


def new_pipeline(shape: Shape, emoji: Emoji, seed: int = 0) -> PixelEditPipeline:
    """A pipeline with random weights that knows the words of `emoji`."""
    tokenizer = word_tokenizer([*emoji.styles, *emoji.names, *EDITS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            patch_size=1,
            in_channels=3 * shape.patch**2,
            num_layers=shape.double,
            num_single_layers=shape.single,
            attention_head_dim=shape.head,
            num_attention_heads=shape.width // shape.head,
            joint_attention_dim=shape.width,
            axes_dims_rope=(shape.head // 4,) * 4,
            guidance_embeds=False,
        )
        words = WordTable(len(tokenizer), shape.width)
    nn.init.zeros_(transformer.proj_out.weight)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return PixelEditPipeline(transformer, scheduler, words, tokenizer, shape.size, shape.patch, shape.references)


class EditModel(nn.Module):
    """What of a pipeline is trained, as one module whose forward pass gives the loss.

    Args:
        pipeline: its transformer and its words are trained in place.
    """

    def __init__(self, pipeline: PixelEditPipeline) -> None:
        super().__init__()
        self.transformer, self.words = pipeline.transformer, pipeline.text_encoder
        self.pipeline = [pipeline]  # in a list: it is no part of the module

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean squared error of the velocity, one number.

        Args:
            inputs: of `prepared`.
        """
        clean, noise, level = inputs["target"], inputs["noise"], inputs["level"]
        noisy = torch.lerp(clean, noise, level[:, None, None])
        places = inputs["places"]
        arguments: dict[str, Any] = {
            "hidden_states": noisy,
            "encoder_hidden_states": self.words(inputs["ids"]),
            "timestep": level,
            "img_ids": places,
            "txt_ids": text_positions(inputs["ids"].shape[1]).to(places.device),
            "return_dict": False,
        }
        if "references" in inputs:
            (pipeline,) = self.pipeline
            arguments |= pipeline.referring(
                arguments, inputs["references"], inputs["reference_places"], inputs["lengths"].tolist()
            )
        velocity = self.transformer(**arguments)[0][:, -clean.shape[1] :]
        return F.mse_loss(velocity.float(), noise - clean)


def prepared(batch: Batch, tokenizer: PreTrainedTokenizerBase, patch: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch as tokens, with noise and noise levels that depend on `seed` alone."""
    random = torch.Generator().manual_seed(seed)
    target = to_tokens(batch.target, patch)
    side = batch.target.shape[-1] // patch
    words = tokenizer(
        list(batch.prompts), padding="max_length", truncation=True, return_tensors="pt",
        max_length=tokenizer.model_max_length,
    )  # fmt: skip
    inputs = {
        "target": target,
        "noise": torch.randn(target.shape, generator=random),
        "level": noise_levels(len(target), random),
        "ids": words["input_ids"],
        "places": positions(side, side),
    }
    if batch.references.shape[1]:
        tokens, places, lengths = reference_tokens(batch.references.unbind(1), patch)
        inputs |= {"references": tokens, "reference_places": places, "lengths": torch.tensor(lengths)}
    return inputs


def noise_levels(count: int, random: torch.Generator) -> torch.Tensor:
    """`[count]`, of a normal distribution behind a sigmoid, most of them high (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(0.3 + 1.2 * torch.randn(count, generator=random))
