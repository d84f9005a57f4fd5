"""A small network that looks at pictures: which style one has, and which concept it shows.

It is trained here on the concepts that the editing model is trained on, too, to tell the styles apart and to place the
same concept in any style at the same spot, so that it knows concepts that neither of them has seen by their neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn

from lissom.diffusion.demo.emoji import Emoji
from lissom.diffusion.demo.task import scaled
from lissom.files import atomic_path

FEATURES = 128
_BATCH = 64  # concepts, each in two styles
_TEMPERATURE = 0.1


class Judge(nn.Module):
    """`[batch, 3, size, size]`, -1 to 1, of any size from 16 pixels.

    Args:
        styles: how many it tells apart.
    """

    def __init__(self, styles: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels in (32, 64, 128):
            layers += [
                nn.Conv2d(before, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.SiLU(),
                nn.Conv2d(channels, channels, 3, 2, padding=1), nn.GroupNorm(8, channels), nn.SiLU(),
            ]  # fmt: skip
            before = channels
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * before, FEATURES))
        self.style = nn.Linear(FEATURES, styles)
        self.concept = nn.Linear(FEATURES, FEATURES)

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """What it sees, `[batch, 128]`."""
        found: torch.Tensor = self.trunk(pictures)
        return found

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the styles, `[batch, styles]`, and where the concepts lie, `[batch, 128]`, of length 1."""
        seen = F.silu(self.features(pictures))
        return self.style(seen), F.normalize(self.concept(seen), dim=1)


def feature_distance(seen: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """1 - the cosine of `Judge.features` of both, `[batch]`."""
    return 1 - F.cosine_similarity(seen, wanted)


def trained_judge(
    emoji: Emoji, steps: int = 400, seed: int = 0, progress: Callable[[int, int], None] = lambda done, total: None
) -> Judge:
    """A judge that has learned the styles of `emoji` and those of its concepts that are not held out.

    Args:
        progress: called with (steps done, steps).
    """
    known = emoji.concepts(held_out=False).numpy()
    batch = min(_BATCH, len(known))
    random = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(len(emoji.styles))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        concepts = torch.from_numpy(random.choice(known, batch, replace=False))
        styles = torch.from_numpy(np.stack([random.permutation(len(emoji.styles))[:2] for _ in range(batch)], 1))
        pictures = _moved(scaled(emoji.pictures[styles, concepts]).flatten(0, 1), random)
        seen, places = judge(pictures)
        one, other = places.split(batch)
        close = one @ other.T / _TEMPERATURE
        same = torch.arange(batch)
        loss = F.cross_entropy(close, same) + F.cross_entropy(close.T, same) + F.cross_entropy(seen, styles.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)
    return judge.eval().requires_grad_(False)


def kept_judge(
    emoji: Emoji, file: Path, steps: int = 400, progress: Callable[[int, int], None] = lambda done, total: None
) -> Judge:
    """The judge in `file`, which is trained and written where there is none."""
    if not file.is_file():
        judge = trained_judge(emoji, steps, progress=progress)
        with atomic_path(file) as temporary:
            save_model(judge, str(temporary))
    judge = Judge(len(emoji.styles))
    load_model(judge, file)
    return judge.eval().requires_grad_(False)


def _moved(pictures: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Each by up to two pixels, with white coming in, and with a little noise: no picture is known by heart."""
    padded = F.pad(pictures, (2, 2, 2, 2), value=1.0)
    size = pictures.shape[-1]
    places = random.integers(0, 5, (len(pictures), 2))
    cut = torch.stack([own[:, y : y + size, x : x + size] for own, (y, x) in zip(padded, places, strict=True)])
    noise = torch.from_numpy(random.standard_normal(cut.shape, np.float32))
    return cut + float(random.uniform(0, 0.1)) * noise
