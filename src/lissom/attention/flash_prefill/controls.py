"""Other ways to choose blocks, on the same kernel: what a comparison of selections needs."""

from __future__ import annotations

from functools import partial

import torch

from lissom.attention.flash_prefill import selection
from lissom.attention.flash_prefill.prefill import Select
from lissom.kernels.blocks import Layout

NAMES = ("random", "top-k", "top-p", "flexprefill", "xattention")


def _random(
    query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float, alpha: torch.Tensor, seed: int
) -> torch.Tensor:
    chosen = selection.above(selection.energies(query, keys, layout, scale), alpha[:: layout.group])
    return selection.at_random(selection.with_forced(chosen, layout), layout, seed)


def _largest(query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float, count: int) -> torch.Tensor:
    return selection.of_largest(selection.energies(query, keys, layout, scale), count)


def _mass(query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float, share: float) -> torch.Tensor:
    return selection.of_mass(selection.energies(query, keys, layout, scale), share)


def _flexprefill(query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float, share: float) -> torch.Tensor:
    return selection.of_mass(selection.of_mean_queries(query, keys, layout, scale), share)


def _xattention(query: torch.Tensor, keys: torch.Tensor, layout: Layout, scale: float, share: float) -> torch.Tensor:
    return selection.of_mass(selection.of_antidiagonals(query, keys, layout, scale), share)


def control(name: str, alpha: torch.Tensor, share: float, count: int, seed: int) -> Select:
    """One of `NAMES`.

    Args:
        alpha: `[query heads]`, of the selection whose numbers of blocks `random` has.
        share: of the energy that `top-p`, `flexprefill` and `xattention` keep.
        count: blocks of `top-k`.
        seed: of `random`.
    """
    controls: dict[str, Select] = {
        "random": partial(_random, alpha=alpha, seed=seed),
        "top-k": partial(_largest, count=count),
        "top-p": partial(_mass, share=share),
        "flexprefill": partial(_flexprefill, share=share),
        "xattention": partial(_xattention, share=share),
    }
    return controls[name]
