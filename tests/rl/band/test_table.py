from __future__ import annotations

import pytest
import torch

from lissom.kernels import native
from lissom.kernels.interpolation import interpolate, reference
from lissom.rl.band.bounds import ratio_bounds
from lissom.rl.band.config import BandConfig, DynamicClip, FixedClip, ProbabilityMask
from lissom.rl.band.divergences import DIVERGENCES
from lissom.rl.band.table import END, table_of


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("radius", [0.01, 0.05, 0.3])
def test_it_is_no_further_from_the_solver_than_it_says(name, radius):
    table = table_of(name, radius)
    assert table.lower_error < 2e-3
    assert table.upper_error < 2e-3
    random = torch.Generator().manual_seed(0)
    logs = torch.cat([-35 * torch.rand(20000, generator=random), -torch.logspace(-6, 0, 20000)])
    low, high = table(logs)
    lower, upper = ratio_bounds(logs, name, radius)
    # Between the points that were compared a kink may be a little sharper than at them.
    assert float((low - lower).abs().max()) < 1.5 * table.lower_error + 1e-6
    assert float(((high - upper) / upper).abs().max()) < 1.5 * table.upper_error + 1e-6


@pytest.mark.parametrize("isa", [None, *native.available_isas()])
def test_native_and_reference_agree(isa, monkeypatch):
    random = torch.Generator().manual_seed(1)
    rows = torch.randn(100, 4, generator=random)
    logs = torch.cat([-50 * torch.rand(70001, generator=random), torch.tensor([0.0, -0.0, 1.0, torch.nan, -torch.inf])])
    limits = (0.5, -0.5, 1.5)
    before = native.status().isa
    if isa is not None:
        native.set_isa(isa)
    try:
        found = interpolate(logs.view(2, -1), rows, END, limits)
    finally:
        if isa is not None:
            native.set_isa(before)
    for mine, theirs in zip(found, reference(logs, rows, END, limits), strict=True):
        assert torch.allclose(mine.flatten(), theirs, atol=2e-4), float((mine.flatten() - theirs).abs().max())


def test_dtypes_and_shapes():
    logs = -torch.rand(2, 3, 5) * 4
    for given in (logs.double(), logs.bfloat16(), logs.transpose(0, 2)):
        low, high = BandConfig().bounds(given)
        assert low.shape == high.shape == given.shape
        assert low.dtype == high.dtype == torch.float32


def test_a_mask_is_where_the_total_variation_ball_is():
    logs = -torch.linspace(0.001, 12, 500)
    mask, ball = ProbabilityMask(0.2, 0.2).bounds(logs), BandConfig("tv", 0.2, cap=None, exact=True).bounds(logs)
    assert all(torch.equal(one, other) for one, other in zip(mask, ball, strict=True))


def test_dynamic_clip_leaves_the_simplex_and_band_does_not():
    logs = torch.tensor([0.97, 0.9]).log()
    assert (DynamicClip().bounds(logs)[1] * logs.exp() > 1).all()
    assert (BandConfig().bounds(logs)[1] * logs.exp() <= 1 + 1e-6).all()
    p = 0.3
    lower, upper = DynamicClip(0.16, 0.2).bounds(torch.tensor(p).log())
    assert float(lower) == pytest.approx(0.5 + 0.5 * max(1 - 4 * 0.16 / p, 0) ** 0.5)
    assert float(upper) == pytest.approx(0.5 + 0.5 * (1 + 4 * 0.2 / p) ** 0.5)


def test_fixed_clip():
    lower, upper = FixedClip(0.1, 0.3).bounds(torch.tensor([-1.0, -20.0]))
    assert lower.tolist() == pytest.approx([0.9, 0.9])
    assert upper.tolist() == pytest.approx([1.3, 1.3])
