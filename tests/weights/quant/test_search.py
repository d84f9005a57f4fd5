"""Rounding and the search against brute force over every code and a fine ladder of scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.kernels.rounding import GRIDS, nearest, rtn
from lissom.weights.quant.search import search

FORMATS = pytest.mark.parametrize("format", list(GRIDS))


def matrix(rows, columns, seed=0, outliers=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.rand(1, columns, generator=generator) ** (4 if outliers else 0)


def weighted_error(coded, weight, importance):
    return ((coded.values().double() - weight.double()) ** 2 * importance.double()).sum()


@FORMATS
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    columns=st.integers(1, 100),
    group=st.sampled_from([32, 64, 96]),
    scale=st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 1e4, 1e7]),
)
def test_properties(format, seed, columns, group, scale):
    grid = GRIDS[format]
    weight = matrix(3, columns, seed) * scale
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 3
    for coded in (rtn(weight, grid, group), search(weight, importance, grid, group)):
        assert coded.codes.shape == weight.shape and coded.codes.dtype == torch.uint8
        assert int(coded.codes.min()) >= grid.low and int(coded.codes.max()) <= grid.high
        assert coded.scales.shape == (3, -(-columns // group)) and bool(torch.isfinite(coded.values()).all())
        # What is packed means the same.
        torch.testing.assert_close(coded.pack().unpack(), coded.values(), rtol=1e-6, atol=0)
        # No other code is nearer, by float64.
        scales = coded.scales.double().repeat_interleave(group, 1)[:, :columns, None]
        mins = 0 if coded.mins is None else coded.mins.double().repeat_interleave(group, 1)[:, :columns, None]
        every = scales * (torch.arange(grid.low, grid.high + 1).double() - grid.zero) + mins
        distances = (every - weight.double()[..., None]).abs()
        chosen = (coded.values().double() - weight.double()).abs()
        assert bool((chosen <= distances.amin(-1) + 1e-5 * (weight.abs().amax() + scales.abs().amax())).all())
    assert (
        weighted_error(coded, weight, importance)
        <= 1.0001 * weighted_error(rtn(weight, grid, group), weight, importance) + 1e-12
    )


def test_zeros_and_constant_groups_are_exact():
    for grid in GRIDS.values():
        for value in (0.0, 0.5, -0.5):
            weight = torch.full((2, 64), value)
            for coded in (rtn(weight, grid, 32), search(weight, torch.ones(64), grid, 32)):
                torch.testing.assert_close(coded.values(), weight, atol=1e-3 * abs(value), rtol=0)


@pytest.mark.parametrize("format", ["q4", "q4_min"])
def test_search_is_near_brute_force(format):
    """Against every pair of a fine ladder of scales and minima."""
    grid = GRIDS[format]
    weight = matrix(24, 32, seed=3, outliers=False)
    importance = torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.01
    least = torch.full((24,), torch.inf)
    reach = weight.abs().amax() / 4
    minima = torch.linspace(-4, 0, 81) if grid.has_min else torch.zeros(1)
    for scale in torch.linspace(-float(reach), float(reach), 161):
        for low in minima:
            values = (nearest(weight, scale, low, grid) - grid.zero) * scale + low
            least = torch.minimum(least, ((values - weight) ** 2 * importance).sum(1))
    found = ((search(weight, importance, grid, 32).values() - weight) ** 2 * importance).sum(1)
    plain = ((rtn(weight, grid, 32).values() - weight) ** 2 * importance).sum(1)
    assert float(found.sum()) < 1.05 * float(least.sum()) and float(found.sum()) < 0.85 * float(plain.sum())


def test_no_importance_at_all_is_plain_rounding():
    weight = matrix(4, 64)
    coded = search(weight, torch.zeros(64), GRIDS["q4"], 32)
    assert ((coded.values() - weight) ** 2).sum() <= ((rtn(weight, GRIDS["q4"], 32).values() - weight) ** 2).sum()
