"""How branches begin and how fast each of their tensors learns, by the two sources that there are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

MAIN_SCALE = 0.5  # of 1 / sqrt(in_features): half the usual
_OMEGA, _PHI = (0.8, 1.2), 0.1


@dataclass(frozen=True)
class Preset:
    """One source's choices.

    Attributes:
        gamma: the learning rate of W_up is multiplied by rho^(2 gamma), rho = min(in_features, out_features) / rank.
        mix: that of the inner matrices by rho^mix.
        omega, phi: those of frequencies and phases by these.
        xavier: whether inner matrices begin uniform in +-sqrt(3 / rank), else normal of deviation 0.5 / sqrt(rank).
        biases: whether W_down has a bias, which begins at 0, and inner matrices one that begins uniform in
            +-1 / sqrt(rank).
    """

    gamma: float
    mix: float
    omega: float
    phi: float
    xavier: bool
    biases: bool


PRESETS: Mapping[str, Preset] = {
    # Re-implementations that cite section 3.3 and appendix A of arXiv 2603.06492.
    "paper": Preset(gamma=0.3, mix=0.45, omega=3.0, phi=5.0, xavier=True, biases=False),
    # github.com/ethansmith2000/noble at ffe59c6. Its own helper trains inner matrices at 1x, by a mistake.
    "repo": Preset(gamma=0.2, mix=0.5, omega=2.0, phi=4.0, xavier=False, biases=True),
}


def learning_rate_factors(
    in_features: int, out_features: int, rank: int, preset: Preset, two_sided: bool = False
) -> dict[str, float]:
    """What the base learning rate is multiplied by for each tensor of a branch, by the last part of its name (paper,
    section 3.3: one-sided scaling; all others, W and b among them, have 1)."""
    rho = min(in_features, out_features) / rank
    down, up = (preset.gamma, preset.gamma) if two_sided else (0.0, 2 * preset.gamma)
    return {"down": rho**down, "up": rho**up, "mix": rho**preset.mix, "omega": preset.omega, "phi": preset.phi}


def generator(seed: int, name: str) -> torch.Generator:
    """Of the random numbers of the tensor `name`: the same wherever and in whatever order tensors are made."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_main(shape: tuple[int, ...], in_features: int, random: torch.Generator) -> torch.Tensor:
    """A main weight of `shape`, fp32: normal with deviation 0.5 / sqrt(in_features)."""
    return torch.randn(shape, generator=random) * (MAIN_SCALE / math.sqrt(in_features))


def draw(name: str, shape: tuple[int, ...], scale: float, preset: Preset, random: torch.Generator) -> torch.Tensor:
    """A tensor of a branch, fp32.

    Args:
        name: last part of its name.
        scale: deviation of `down`, and of `up`; other tensors do not depend on it.
    """
    if name in ("down", "up"):
        return torch.randn(shape, generator=random) * scale
    if name == "mix":
        half = math.sqrt(3 / shape[1])
        uniform = (2 * torch.rand(shape, generator=random) - 1) * half
        return uniform if preset.xavier else torch.randn(shape, generator=random) * (0.5 / math.sqrt(shape[1]))
    if name == "mix_bias":
        return (2 * torch.rand(shape, generator=random) - 1) / math.sqrt(shape[0])
    if name == "down_bias":
        return torch.zeros(shape)
    if name == "omega":
        low, high = _OMEGA
        return low + (high - low) * torch.rand(shape, generator=random)
    if name == "phi":  # wrapped once: later AdamW's averages would not fit a phase that jumps
        return (torch.randn(shape, generator=random) * _PHI).remainder(2 * math.pi)
    raise ValueError(f"A branch has no {name}.")
