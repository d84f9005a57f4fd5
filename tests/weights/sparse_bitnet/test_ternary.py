"""Masks, scales and ternary values against loops in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.errors import UserError
from lissom.weights.sparse_bitnet.ternary import nm_mask, scale_of, sparse_ternary, ternary


def mask_of(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    """The definition: in each group one place after the other, always the largest that is left, the first of equals."""
    mask = np.zeros(weight.shape, bool)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            for _ in range(n):
                left = np.where(mask[row, start : start + m], -1.0, np.abs(weight[row, start : start + m]))
                mask[row, start + int(np.argmax(left))] = True
    return mask


patterns = st.sampled_from([(1, 1), (1, 2), (2, 4), (1, 4), (3, 4), (4, 4), (6, 8), (2, 8), (5, 7), (3, 3)])


@given(
    pattern=patterns, rows=st.integers(1, 5), groups=st.integers(1, 6), few=st.booleans(), seed=st.integers(0, 10_000)
)
@settings(max_examples=80, deadline=None)
def test_masks_keep_the_largest_of_each_group(pattern, rows, groups, few, seed):
    n, m = pattern
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, groups * m)).astype(np.float32)
    if few:  # equal magnitudes are common
        weight = np.sign(weight) * random.integers(0, 3, weight.shape).astype(np.float32)
    mask = nm_mask(torch.from_numpy(weight), n, m)
    np.testing.assert_array_equal(mask.numpy(), mask_of(weight, n, m))
    assert (mask.unflatten(1, (-1, m)).sum(-1) == n).all()


def test_groups_do_not_straddle_rows():
    with pytest.raises(UserError, match="multiple of 4 inputs"):
        nm_mask(torch.ones(4, 6), 2, 4)


@pytest.mark.parametrize("n,m", [(0, 4), (5, 4), (-1, 2)])
def test_what_is_no_pattern_is_refused(n, m):
    with pytest.raises(UserError, match="n of m"):
        nm_mask(torch.ones(4, 8), n, m)


def test_the_scale_is_of_the_dense_weights():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    mask = nm_mask(weight, 2, 4)
    assert float(scale_of(weight)) == 2.5
    assert float(scale_of(weight, mask, "masked")) == 1.75
    assert float(scale_of(weight, mask, "survivors")) == 3.5
    assert float(scale_of(torch.zeros(2, 4))) == pytest.approx(1e-5)


def test_ternary_values_round_halves_to_zero():
    weight = torch.tensor([[0.5, -0.5, 0.51, -1.5, 3.0, 0.0]])
    assert ternary(weight, torch.tensor(1.0)).tolist() == [[0, 0, 1, -1, 1, 0]]


@pytest.mark.parametrize("n,m", [(2, 4), (6, 8)])
def test_order_of_mask_and_rounding_does_not_matter(n, m):
    """With the scale of the dense weights: what is masked first rounds to zero."""
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    whole, mask, scale = sparse_ternary(weight, n, m)
    assert torch.equal(whole, ternary(weight * mask, scale_of(weight)))
    assert not torch.equal(whole, ternary(weight * mask, scale_of(weight, mask, "survivors")))
    assert float(scale) == pytest.approx(float(weight.abs().mean()))


def test_masks_of_ternary_values_are_decided_by_the_index():
    weight = torch.tensor([[0.9, 2.0, 1.1, 3.0]])
    assert sparse_ternary(weight, 2, 4)[0].tolist() == [[0, 1, 0, 1]]
    assert sparse_ternary(weight, 2, 4, mask_from="ternary")[0].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    "n,m,zeros,empty", [(4, 4, 0.310, 0.0092), (6, 8, 0.346, None), (4, 8, 0.510, None), (2, 4, 0.525, 0.0092)]
)
def test_shares_of_zeros_of_normal_weights(n, m, zeros, empty):
    """By arithmetic: a weight rounds to zero below half the mean magnitude, with probability erf(1 / (2 sqrt(pi)))."""
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    whole = sparse_ternary(weight, n, m)[0]
    assert float((whole == 0).float().mean()) == pytest.approx(zeros, abs=0.002)
    if empty is not None:
        assert float((~whole.unflatten(1, (-1, 4)).any(-1)).float().mean()) == pytest.approx(empty, abs=0.001)
