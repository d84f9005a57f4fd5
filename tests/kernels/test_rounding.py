"""Round-to-nearest against its definition; its properties are tested beside those of the search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.kernels.packed import pack_codes
from lissom.kernels.rounding import GRIDS, rtn


def matrix(rows, columns):
    """Inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.rand(1, columns, generator=generator) ** 4


@pytest.mark.parametrize("format", list(GRIDS))
def test_rtn_covers_the_group(format):
    weight = matrix(8, 96)
    coded = rtn(weight, GRIDS[format], 32)
    step = coded.scales.float().abs().repeat_interleave(32, 1)
    # Half a step, and what rounding the scale to fp16 moves the farthest code by; q4 has no code at +8.
    reach = 1.0 if format == "q4" else 0.5
    assert bool(((coded.values() - weight).abs() <= step * (reach + 255 / 2048)).all())


def test_rtn_is_the_oracle_s():
    """GGUF's Q4_0 and Q4_1 by their definition, in NumPy."""
    weight = matrix(5, 64).numpy()
    coded = rtn(torch.tensor(weight), GRIDS["q4"], 32)
    for row, codes, scales in zip(weight, coded.codes.numpy(), coded.scales.numpy(), strict=True):
        for g in range(2):
            block = row[32 * g : 32 * g + 32]
            scale = np.float16(block[np.abs(block).argmax()] / -8)
            assert scales[g] == scale
            wanted = np.clip(np.round(block / np.float32(scale)) + 8, 0, 15)
            assert np.array_equal(codes[32 * g : 32 * g + 32], wanted)
    coded = rtn(torch.tensor(weight), GRIDS["q4_min"], 32)
    assert np.array_equal(coded.mins.numpy(), weight.reshape(5, 2, 32).min(-1).astype(np.float16))


@pytest.mark.parametrize("format", list(GRIDS))
def test_a_short_last_group_has_its_own_range(format):
    """Its padding does not widen it: 8 weights alone are rounded as well as behind others."""
    weight = torch.rand(4, 40, generator=torch.Generator().manual_seed(1)) + 5
    whole, alone = rtn(weight, GRIDS[format], 32), rtn(weight[:, 32:], GRIDS[format], 32)
    assert whole.values()[:, 32:].equal(alone.values()) and whole.scales[:, 1:].equal(alone.scales)
    if format == "q4_min":
        assert (alone.values() - weight[:, 32:]).abs().max() < 1 / 15


def test_weights_on_the_grid_are_kept():
    """A group that uses both ends of its grid comes back as it was."""
    codes = torch.arange(64, dtype=torch.uint8).remainder(16).repeat(8, 1)
    packed = pack_codes(codes, torch.rand(8, 2) + 0.1, -torch.rand(8, 2), "q4_min")
    again = rtn(packed.unpack(), GRIDS["q4_min"], 32).pack()
    torch.testing.assert_close(again.unpack(), packed.unpack(), rtol=2e-3, atol=1e-3)
