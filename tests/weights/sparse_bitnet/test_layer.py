"""The trainable layer against the formulas with autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.pytorch_utils import Conv1D

from lissom.errors import UserError
from lissom.weights.sparse_bitnet import SparseBitNetConfig
from lissom.weights.sparse_bitnet.layer import SparseTernary, plain, trainable
from lissom.weights.sparse_bitnet.ternary import nm_mask
from lissom.weights.sparse_bitnet.training import SparseTraining


def layer_of(settings: SparseBitNetConfig, parts=(12,), bias=True, kind="linear") -> SparseTernary:
    torch.manual_seed(0)
    module = nn.Linear(16, 12, bias=bias) if kind == "linear" else Conv1D(12, 16)
    nn.init.normal_(module.weight)
    return trainable(module, settings, parts)


def straight(value: torch.Tensor, through: torch.Tensor) -> torch.Tensor:
    """`value`, with the gradient of `through`."""
    return through + (value - through).detach()


def oracle(x, weight, bias, n, m, masked=False):
    mask = nm_mask(weight, n, m).double()
    gamma = weight.detach().abs().mean()
    effective = gamma * torch.clamp(torch.round(weight / gamma), -1, 1) * mask
    s = 127 / x.detach().abs().amax(-1, keepdim=True)
    quantised = torch.round(x * s) / s
    through = weight * mask if masked else weight
    return straight(quantised, x) @ straight(effective, through).T + bias


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n,m", [(2, 4), (6, 8), (4, 4)])
def test_product_and_both_gradients(n, m, masked):
    layer = layer_of(SparseBitNetConfig(n=n, m=m, gradient="masked" if masked else "dense"))
    x = torch.randn(3, 5, 16, requires_grad=True)
    wide = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    out, wanted = layer(x), oracle(*wide, n, m, masked)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    toward = torch.randn_like(out)
    out.backward(toward)
    wanted.backward(toward.double())
    for ours, theirs in zip((x, layer.weight, layer.bias), wide, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_pruned_weights_learn_and_can_come_back():
    layer = layer_of(SparseBitNetConfig(n=2, m=4), bias=False)
    mask = layer.frozen()[1]
    layer(torch.randn(64, 16)).square().sum().backward()
    assert (layer.weight.grad[~mask] != 0).all()
    with torch.no_grad():
        layer.weight[~mask] += 10 * layer.weight[~mask].sign()
    assert not (layer.frozen()[1] & mask).any()


@pytest.mark.parametrize("gradient", ["dense", "masked"])
def test_the_control_is_masked_and_not_quantised(gradient):
    layer = layer_of(SparseBitNetConfig(n=1, m=4, quantize=False, gradient=gradient), bias=False)
    x = torch.randn(7, 16)
    mask = nm_mask(layer.weight, 1, 4)
    out = layer(x)
    torch.testing.assert_close(out, x @ (layer.weight * mask).T)
    out.sum().backward()
    assert bool((layer.weight.grad[~mask] != 0).any()) == (gradient == "dense")


def test_fused_matrices_have_scales_of_their_own():
    layer = layer_of(SparseBitNetConfig(), parts=(8, 4), bias=False)
    with torch.no_grad():
        layer.weight[8:] *= 100
    whole, mask, scales = layer.frozen()
    for rows in (slice(0, 8), slice(8, 12)):
        torch.testing.assert_close(scales[rows], layer.weight[rows].abs().mean().expand(rows.stop - rows.start))
    assert (whole[8:] == 0).float().mean() < 0.6  # one scale for all would leave no zeros there
    assert mask.sum() == 12 * 8


def training_of(layer) -> SparseTraining:
    model = nn.ModuleList([layer])
    model.config = LlamaConfig()
    return SparseTraining(model, layer.settings)


def test_masks_are_off_before_the_sparse_share_of_training():
    layer = layer_of(SparseBitNetConfig(sparse_share=0.25))
    assert layer.sparse and layer.frozen()[1].sum() == 12 * 8
    training = training_of(layer)
    for done, masked in ((0.01, False), (0.75, False), (0.76, True), (1.0, True)):
        training.begin_step(done)
        assert layer.sparse is masked and layer.frozen()[1].all() is not masked


@pytest.mark.parametrize(
    "share,steps,sparse", [(0.7, 10, 7), (0.7, 20, 14), (0.25, 2000, 500), (0.05, 6, 1), (1.0, 7, 7)]
)
def test_the_share_of_sparse_steps(share, steps, sparse):
    layer = layer_of(SparseBitNetConfig(sparse_share=share))
    training, found = training_of(layer), 0
    for step in range(steps):
        training.begin_step((step + 1) / steps)
        found += layer.sparse
    assert found == sparse


@pytest.mark.parametrize("mask_from", ["master", "ternary"])
@pytest.mark.parametrize("scale_from", ["dense", "masked", "survivors"])
def test_the_layer_computes_with_the_ablation_that_it_is_set_to(mask_from, scale_from):
    layer = layer_of(SparseBitNetConfig(n=1, m=4, mask_from=mask_from, scale_from=scale_from), bias=False)
    weight = layer.weight.detach().double()
    mask = nm_mask(layer.weight, 1, 4)
    magnitudes = weight.abs() if scale_from == "dense" else weight.abs() * mask
    scale = magnitudes.sum() / (mask.sum() if scale_from == "survivors" else mask.numel())
    rounded = torch.clamp(torch.round(weight / scale), -1, 1)
    if mask_from == "ternary":
        mask = nm_mask(rounded, 1, 4)
    x = torch.randn(5, 16)
    inverse = 127 / x.double().abs().amax(-1, keepdim=True)
    wanted = torch.round(x.double() * inverse) / inverse @ (scale * rounded * mask).T
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_flips_are_of_masks_since_the_line_before():
    layer = layer_of(SparseBitNetConfig(), bias=False)
    training = training_of(layer)
    with torch.no_grad():
        layer.weight[:, :4] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    training.begin_step(0.5)
    with torch.no_grad():
        layer.weight[0, :4] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert training.measures()["mask_flips"] == 4 / (12 * 16)
    training.begin_step(1.0)
    assert training.measures()["mask_flips"] == 0


def test_masters_of_16_bits_are_not_trained():
    layer = layer_of(SparseBitNetConfig()).to(torch.bfloat16)
    x = torch.randn(2, 16, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="Master weights are bfloat16"):
        layer(x)
    assert layer.eval()(x).isfinite().all()


def test_the_layer_of_gpt2_is_the_transposed_one():
    layer, other = layer_of(SparseBitNetConfig(), kind="conv"), layer_of(SparseBitNetConfig())
    with torch.no_grad():
        other.weight.copy_(layer.weight.T)
        other.bias.copy_(layer.bias)
    x = torch.randn(2, 3, 16)
    out = layer(x)
    assert torch.equal(out, other(x))
    out.sum().backward()
    other(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, other.weight.grad.T)
    assert type(plain(layer)) is Conv1D and plain(layer).weight is layer.weight


def test_gradients_are_the_same_with_checkpointing_and_accumulation():
    layer, x = layer_of(SparseBitNetConfig()), torch.randn(8, 16)
    layer(x).square().sum().backward()
    whole = layer.weight.grad.clone()
    layer.weight.grad = None
    for part in x.split(4):
        torch.utils.checkpoint.checkpoint(layer, part, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, whole)


def test_masters_stay_fp32_under_autocast():
    layer, x = layer_of(SparseBitNetConfig()), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)
    out.float().square().sum().backward()
    narrow, layer.weight.grad = layer.weight.grad, None
    layer(x.bfloat16().float()).square().sum().backward()
    assert narrow.dtype == torch.float32
    assert float((narrow - layer.weight.grad).norm() / layer.weight.grad.norm()) < 0.02
