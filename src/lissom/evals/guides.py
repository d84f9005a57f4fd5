"""Guides of six kinds, made of pictures of emoji that the model has not seen, and what is to be drawn from each.

Some come about by a measurement that some methods need to know, some do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from lissom.diffusion.demo import Emoji
from lissom.diffusion.demo.task import scaled
from lissom.evals.guided_sampling import Measure


@dataclass(frozen=True)
class Guide:
    """How a guide comes about.

    Attributes:
        guide: of pictures `[batch, 3, size, size]`, or of those of another style.
        measure: what methods that need one are told; None: nothing is known.
        known: `[size, size]` to where the guide holds; None: everywhere.
        from_style: the guide is made of the concept in this style, and in any other where it is ""; None: of the
            picture itself.
    """

    guide: Callable[[torch.Tensor], torch.Tensor]
    measure: Measure | None = None
    known: Callable[[int], torch.Tensor] | None = None
    from_style: str | None = None


def _smaller(pictures: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pictures, 4)


def _blurred(pictures: torch.Tensor, sigma: float = 2.0) -> torch.Tensor:
    places = torch.arange(-6, 7, dtype=pictures.dtype, device=pictures.device)
    line = torch.exp(-(places**2) / (2 * sigma**2))
    kernel = (line / line.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pictures, (6, 6, 6, 6), mode="replicate")
    across = F.conv2d(padded, kernel, groups=3)
    return F.conv2d(across, kernel.transpose(2, 3), groups=3)


def _hole(size: int) -> torch.Tensor:
    """1 but for a square in the middle, half as wide."""
    known = torch.ones(size, size)
    known[size // 4 : -size // 4, size // 4 : -size // 4] = 0
    return known


def _with_hole(pictures: torch.Tensor) -> torch.Tensor:
    return pictures * _hole(pictures.shape[-1]).to(pictures)


def _enlarged(pictures: torch.Tensor, mode: str, factor: int) -> torch.Tensor:
    small = F.avg_pool2d(pictures, factor)
    return F.interpolate(small, scale_factor=factor, mode=mode).clamp(-1, 1)


def _itself(pictures: torch.Tensor) -> torch.Tensor:
    return pictures


GUIDES = {
    "low resolution": Guide(partial(_enlarged, mode="bicubic", factor=4), _smaller),
    "blur": Guide(_blurred, _blurred),
    "missing region": Guide(_with_hole, _with_hole, _hole),
    "colour layout": Guide(partial(_enlarged, mode="nearest", factor=8)),
    "sketch": Guide(_itself, from_style="line"),
    "another style": Guide(_itself, from_style=""),
}


@dataclass(frozen=True)
class Request:
    """What is drawn.

    Attributes:
        target, guide: `[pictures, 3, size, size]`, -1 to 1.
        prompts: of each.
        how: the guide came about.
    """

    target: torch.Tensor
    guide: torch.Tensor
    prompts: tuple[str, ...]
    how: Guide

    def to(self, device: torch.device) -> Request:
        """The same on `device`."""
        return replace(self, target=self.target.to(device), guide=self.guide.to(device))

    def part(self, rows: slice) -> Request:
        """Some of the pictures."""
        return replace(self, target=self.target[rows], guide=self.guide[rows], prompts=self.prompts[rows])


def requests(emoji: Emoji, names: Sequence[str], pictures: int) -> Iterator[tuple[str, Request]]:
    """What is drawn, by kind of guide: held-out concepts, each in every style, in a random order.

    Args:
        names: of `GUIDES`.
        pictures: of each kind at most.
    """
    held = emoji.concepts(held_out=True)
    for name in names:
        how, random = GUIDES[name], np.random.default_rng(0)
        targets, sources, prompts = [], [], []
        order = [(int(concept), style) for style in range(len(emoji.styles)) for concept in held]
        random.shuffle(order)
        for concept, style in order:
            others = [own for own in range(len(emoji.styles)) if own != style]
            source = style
            if how.from_style is not None:
                source = emoji.styles.index(how.from_style) if how.from_style else int(random.choice(others))
            if how.from_style is not None and source == style:
                continue
            targets.append(emoji.pictures[style, concept])
            sources.append(emoji.pictures[source, concept])
            prompts.append(emoji.prompt(concept, style))
            if len(targets) == pictures:
                break
        guide = how.guide(scaled(torch.stack(sources)))
        yield name, Request(scaled(torch.stack(targets)), guide, tuple(prompts), how)
