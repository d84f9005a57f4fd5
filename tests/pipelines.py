"""Tiny pipelines with random weights, and pictures for them."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from PIL import Image

from lissom.diffusion.demo import Emoji
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.diffusion.demo.words import WordTable, word_tokenizer


def editing(references="set", seed=0, guidance_embeds=False):
    """Draws 16 by 16 pixels, knows five words, and has outputs that are not small."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(["a red blue thing"])
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=48, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    words = WordTable(len(tokenizer), 32)
    made = PixelEditPipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), words, tokenizer, size=16, references=references
    )
    made.set_progress_bar_config(disable=True)
    return made


def pictures(count, seed=0, sizes=((16, 16), (24, 8), (8, 12), (8, 32))):
    """Of noise."""
    random = np.random.default_rng(seed)
    return [
        Image.fromarray(random.integers(0, 256, (*sizes[number % len(sizes)], 3), dtype=np.uint8))
        for number in range(count)
    ]


def small_emoji():
    """30 concepts in five styles, each a colour; every fifth is held out."""
    random = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (5, 30, 3, 1, 1), generator=random, dtype=torch.uint8)
    whole = colours.expand(5, 30, 3, 16, 16).contiguous()
    names = tuple(f"thing {number}" for number in range(30))
    return Emoji(whole, ("a", "b", "c", "d", "e"), names, ("Things",) * 30, torch.arange(30) % 5 == 3)
