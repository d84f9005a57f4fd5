from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from noble_oracle import branched as oracle
from torch import nn
from transformers.pytorch_utils import Conv1D

from lissom.weights.noble import NobleConfig
from lissom.weights.noble.activation import KINDS
from lissom.weights.noble.apply import layers_of


def layer_of(kind="cosnet", rows=12, columns=20, rank=5, bias=True, conv=False, loud=True, **changes):
    """A layer with a branch whose output is as large as its main path's."""
    torch.manual_seed(0)
    model = nn.ModuleList([Conv1D(rows, columns) if conv else nn.Linear(columns, rows, bias)])
    layer = NobleConfig(rank=rank, activation=kind, **changes).convert(model)[0]
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.normal_()
        if loud:
            layer.noble.up.normal_()
            for name, parameter in layer.noble.named_parameters():
                if "bias" in name:
                    parameter.normal_()
    return layer


def numbers(layer):
    tensors = {name: p.detach().double().numpy() for name, p in layer.noble.named_parameters()}
    weight = layer.matrix().detach().double().numpy()
    return weight, None if layer.bias is None else layer.bias.detach().double().numpy(), tensors


@pytest.mark.parametrize("rows", [1, 7, 100])  # few and many take other products
@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("preset", ["paper", "repo"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_give_what_the_formulas_say(kind, preset, centred, conv, rows):
    layer = layer_of(kind, conv=conv, preset=preset, centred=centred)
    x = torch.randn(rows, 20)
    wanted = oracle(kind, centred, x.double().numpy(), *numbers(layer))
    for layer.fused in (True, False):
        np.testing.assert_allclose(layer(x).detach().numpy(), wanted, atol=3e-5, rtol=1e-4)
        np.testing.assert_allclose(layer(x[None]).detach().numpy()[0], wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 80])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("preset", ["paper", "repo"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_operations_in_float64(kind, preset, centred, bias, rows):
    layer = layer_of(kind, bias=bias, preset=preset, centred=centred)
    exact = copy.deepcopy(layer)
    exact.double()
    exact.fused = False
    x, of_y = torch.randn(2, rows, 20), torch.randn(2, rows, 12)
    found = []
    for own in (layer, exact):
        given_x = x.clone().to(own.weight.dtype).requires_grad_()
        own(given_x).backward(of_y.to(own.weight.dtype))
        found.append([given_x.grad, *(parameter.grad for parameter in own.parameters())])
    for got, wanted in zip(*found, strict=True):
        largest = max(10.0, float(wanted.abs().max()))  # sums of many that cancel
        torch.testing.assert_close(got.double(), wanted.double(), atol=1e-5 * largest, rtol=1e-3)


def test_float64_gradients_pass_gradcheck():
    layer = layer_of(rows=5, columns=6, rank=3).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), atol=1e-4, eps=1e-4)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 90), columns=st.integers(2, 40), outputs=st.integers(2, 40), rank=st.integers(1, 39))
def test_any_size_gives_what_the_formulas_say(rows, columns, outputs, rank):
    rank = min(rank, columns - 1, outputs - 1)
    layer = layer_of(rows=outputs, columns=columns, rank=rank)
    x = torch.randn(rows, columns)
    wanted = oracle("cosnet", False, x.double().numpy(), *numbers(layer))
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [2, 200])
@pytest.mark.parametrize("conv", [False, True])
def test_a_branch_without_output_is_the_plain_layer_bit_for_bit(conv, rows):
    layer = layer_of(rows=64, columns=48, rank=8, conv=conv)
    with torch.no_grad():
        layer.noble.up.zero_()
    x = torch.randn(rows, 48)
    plain = nn.Linear(48, 64)
    plain.weight.data, plain.bias.data = layer.matrix().data, layer.bias.data
    for layer.fused in (True, False):
        assert torch.equal(layer(x), plain(x))


def test_a_centred_branch_adds_nothing_to_an_input_of_zero():
    layer = layer_of(centred=True, preset="repo")
    for layer.fused in (True, False):
        assert torch.equal(layer(torch.zeros(3, 20)), layer.bias.expand(3, -1))


def test_padding_and_batches_do_not_change_a_token():
    layer = layer_of()
    x = torch.randn(4, 30, 20)
    torch.testing.assert_close(layer(x)[2, 7], layer(x[2:3, 7:8])[0, 0], atol=1e-5, rtol=1e-4)


def test_what_is_kept_for_the_gradients_is_less():
    layer = layer_of(rows=64, columns=64, rank=32, bias=False)
    x = torch.randn(256, 64, requires_grad=True)

    def kept(fused: bool) -> int:
        layer.fused, held = fused, {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes() // 4 if tensor.shape[0] == 256 else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x)
        return sum(held.values())

    assert kept(True) == 256 * (64 + 32)  # the input and what W_down makes of it
    assert kept(False) >= 256 * (64 + 4 * 32)


def test_16_bits_keep_frequencies_and_phases():
    layer = layer_of()
    omega = layer.noble.omega_0.detach().clone()
    layer.bfloat16()
    assert layer.noble.omega_0.dtype == layer.noble.phi_1.dtype == torch.float32
    assert torch.equal(layer.noble.omega_0, omega) and layer.noble.mix_0.dtype == torch.bfloat16
    x = torch.randn(9, 20).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    wanted = oracle("cosnet", False, x.double().numpy(), *numbers(layer))
    np.testing.assert_allclose(layer(x).detach().float().numpy(), wanted, atol=0.1, rtol=0.05)
    layer(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.parametrize("rows", [3, 100])
def test_autocast_is_near_fp32(rows):
    layer = layer_of(columns=32)
    x = torch.randn(rows, 32)
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, atol=0.15, rtol=0.05)
    got.sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and bool(torch.isfinite(layer.noble.mix_0.grad).all())


@pytest.mark.parametrize("kind", ["cosnet", "gelu-net"])
def test_gradient_checkpointing_changes_nothing(kind):
    layer = layer_of(kind)
    x = torch.randn(70, 20, requires_grad=True)
    layer(x).square().sum().backward()
    wanted = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    for got, want in zip([x.grad, *(p.grad for p in layer.parameters())], wanted, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["cosnet", "tanh-net"])
def test_torch_compile_gives_the_same(kind):
    layer = layer_of(kind, centred=True)
    x = torch.randn(70, 20, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for run in (layer, compiled):
        layer.zero_grad()
        x.grad = None
        y = run(x)
        y.square().sum().backward()
        found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
        if run is layer:
            wanted = found
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_only_layers_with_branches_are_counted():
    assert not layers_of(nn.Linear(3, 3))


@pytest.mark.parametrize("tokens", [3, 100])
@pytest.mark.parametrize("fused", [True, False])
def test_what_comes_out_is_as_a_plain_layers(fused, tokens):
    layer = layer_of()
    layer.fused = fused
    y = layer(torch.randn(2, tokens, 20))
    assert y.is_contiguous() and y.view(2, -1).shape == (2, tokens * 12)
    y += 1
    y.sum().backward()
    assert layer(torch.randn(20)).shape == (12,) and layer(torch.randn(0, 20)).shape == (0, 12)


def test_second_derivatives_are_refused_rather_than_wrong():
    layer = layer_of()
    x = torch.randn(3, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
    layer.fused = False  # computes them
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


@pytest.mark.parametrize("frozen", ["weight", "bias", "noble.down", "noble.omega_0"])
def test_what_is_frozen_has_no_gradient(frozen):
    layer = layer_of()
    layer.get_parameter(frozen).requires_grad_(False)
    layer(torch.randn(70, 20)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (name == frozen), name


def test_16_bits_keep_the_gradients_of_frequencies_too():
    layer = layer_of()
    layer(torch.randn(9, 20)).sum().backward()
    before = layer.noble.omega_0.grad.clone()
    layer.bfloat16()
    assert torch.equal(layer.noble.omega_0.grad, before) and layer.noble.mix_0.grad.dtype == torch.bfloat16


def test_another_dtype_is_refused_as_plain_layers_refuse_it():
    layer = layer_of()
    for rows in (3, 100):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.zeros(rows, 20, dtype=torch.float64))


def test_shapes_are_known_without_numbers():
    layer = layer_of().to("meta")
    assert layer(torch.zeros(3, 20, device="meta")).shape == (3, 12)
