"""GPTQ against optimal brain quantisation column by column, as its paper derives it, in NumPy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lissom.errors import UserError
from lissom.kernels.rounding import GRIDS, nearest, rtn
from lissom.weights.quant.gptq import damped, gptq
from lissom.weights.quant.search import search


def problem(rows=12, columns=96, samples=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(samples, columns, generator=generator) @ mixing
    inputs *= torch.rand(columns, generator=generator) * 3
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs.T @ inputs / samples


def oracle(weight, hessian, scales, mins, grid, group, order):
    """Round a column, move the others against its error by the inverse Hessian, strike the column out, and again."""
    left, inverse = weight.double().numpy().copy(), np.linalg.inv(hessian.double().numpy())
    codes = np.zeros_like(left)
    for column in order:
        scale = scales[:, column // group]
        low = 0 if mins is None else mins[:, column // group]
        codes[:, column] = np.clip(np.round((left[:, column] - low) / scale) + grid.zero, grid.low, grid.high)
        error = left[:, column] - ((codes[:, column] - grid.zero) * scale + low)
        left -= np.outer(error / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column] = inverse[:, column] = 0
        inverse[column, column] = 1
    return codes


@pytest.mark.parametrize("format", list(GRIDS))
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [16, 128])
def test_it_is_brain_quantisation(format, act_order, block):
    weight, hessian = problem()
    grid = GRIDS[format]
    coded = gptq(weight, hessian, grid, 32, act_order=act_order, block=block)
    whole = damped(hessian, 0.01)
    order = whole.diagonal().argsort(descending=True, stable=True).numpy() if act_order else range(96)
    mins = None if coded.mins is None else coded.mins.double().numpy()
    wanted = oracle(weight, whole, coded.scales.double().numpy(), mins, grid, 32, order)
    # A tie that falls the other way in the last bit moves the columns after it.
    assert (coded.codes.numpy() == wanted).mean() > 0.99


@pytest.mark.parametrize("format", ["q4", "q4_min"])
def test_its_outputs_are_nearer_than_the_search_s(format):
    weight, hessian = problem(seed=1)
    grid = GRIDS[format]

    def loss(coded):
        error = coded.values() - weight
        return float((error @ hessian * error).sum())

    ours = loss(gptq(weight, hessian, grid, 32))
    searched = loss(search(weight, hessian.diagonal(), grid, 32))
    assert ours < 0.8 * searched < loss(rtn(weight, grid, 32))


def test_a_shrunk_hessian_lies_between_gptq_and_the_search():
    weight, hessian = problem()
    grid = GRIDS["q4"]
    wanted = 0.75 * hessian.double() + 0.25 * hessian.diagonal().double().diag()
    torch.testing.assert_close(damped(hessian, 0.01, 0.25), damped(wanted, 0.01))
    whole = gptq(weight, hessian, grid, 32, shrinkage=1.0)
    scales = whole.scales.float().repeat_interleave(32, 1)
    assert torch.equal(whole.codes.float(), nearest(weight, scales, torch.zeros_like(scales), grid))
    assert not torch.equal(whole.codes, gptq(weight, hessian, grid, 32).codes)


def test_shrinking_helps_where_samples_are_few():
    """By the outputs on other inputs than those that the codes were made from."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4096, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight, known, others = torch.randn(24, 96, generator=generator), inputs[:64], inputs[64:]

    def loss(shrinkage):
        hessian = known.T @ known / len(known)
        error = gptq(weight, hessian, GRIDS["q4"], 32, shrinkage=shrinkage).values() - weight
        return float((others @ error.T).square().mean())

    assert loss(0.5) < 0.9 * min(loss(0.0), loss(1.0))


def test_inputs_that_are_never_seen():
    weight, hessian = problem()
    hessian[5] = hessian[:, 5] = 0
    coded = gptq(weight, hessian, GRIDS["q4"], 32)
    assert bool(torch.isfinite(coded.values()).all())
    coded = gptq(weight, torch.zeros_like(hessian), GRIDS["q4"], 32)
    assert torch.equal(coded.codes, search(weight, torch.ones(96), GRIDS["q4"], 32).codes)


def test_a_damaged_hessian_is_refused():
    weight, hessian = problem()
    hessian[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        gptq(weight, hessian, GRIDS["q4"], 32)
