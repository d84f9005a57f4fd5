from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.kernels import native
from lissom.kernels.cosnet import cosnet, cosnet_backward, has_kernel

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")
ISAS = native.available_isas()
NAMES = ("h", "omega_0", "phi_0", "mix", "bias", "omega_1", "phi_1")


@pytest.fixture(params=ISAS)
def isa(request):
    before = native.status().isa
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


def case(tokens: int, rank: int, biased: bool, size: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor | None]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    return {
        "h": normal(tokens, rank) * size, "omega_0": 1 + 0.3 * normal(rank), "phi_0": normal(rank),
        "mix": normal(rank, rank) / math.sqrt(rank), "bias": normal(rank) if biased else None,
        "omega_1": 1 + 0.3 * normal(rank), "phi_1": normal(rank),
    }  # fmt: skip


def exact(given: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    t = {name: None if part is None else part.double().requires_grad_() for name, part in given.items()}
    inner = torch.cos(t["omega_0"] * t["h"] + t["phi_0"]) @ t["mix"].T
    return torch.cos(t["omega_1"] * (inner if t["bias"] is None else inner + t["bias"]) + t["phi_1"]), t


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens,rank", [(1, 1), (3, 5), (128, 8), (129, 16), (1100, 33)])
def test_values_and_gradients_are_those_of_float64(isa, tokens, rank, biased):
    given = case(tokens, rank, biased)
    value, t = exact(given)
    gradient = torch.randn(tokens, rank, generator=torch.Generator().manual_seed(1))
    value.backward(gradient.double())
    assert has_kernel(given["h"])
    got = cosnet(*given.values())
    np.testing.assert_allclose(got.numpy(), value.detach().numpy(), atol=3e-6)
    again, *found = cosnet_backward(given["h"], gradient, *list(given.values())[1:])
    assert torch.equal(again, got)
    for name, own in zip(NAMES, found, strict=True):
        if t[name] is not None:
            wanted = t[name].grad
            torch.testing.assert_close(own.double(), wanted, atol=1e-5 * float(wanted.abs().max() + 1), rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 300), rank=st.integers(1, 70), seed=st.integers(0, 99))
def test_a_token_does_not_see_others(tokens, rank, seed):
    given = case(tokens, rank, True, seed=seed)
    whole = cosnet(*given.values())
    one = cosnet(*(given | {"h": given["h"][-1:]}).values())
    assert torch.equal(whole[-1:], one)


@pytest.mark.parametrize("size", [30.0, 1e3, 1e4])
def test_large_arguments_keep_what_fp32_can_tell(isa, size):
    given = case(200, 4, False, size)
    h, omega, phi = given["h"], given["omega_0"], given["phi_0"]
    given |= {"mix": torch.eye(4), "omega_1": torch.zeros(4), "phi_1": torch.full((4,), math.pi / 2)}
    given["phi_0"], given["omega_0"] = torch.zeros(4), torch.ones(4)
    _, _, _, slopes, *_ = cosnet_backward(h, torch.ones_like(h), *list(given.values())[1:])
    assert bool(torch.isfinite(slopes).all()) and omega.shape == phi.shape
    given |= {"omega_1": torch.full((4,), 1e-3), "phi_1": torch.full((4,), -math.pi / 2)}  # sin(x / 1000) = x / 1000
    got = cosnet(*given.values()) * 1e3
    np.testing.assert_allclose(got.numpy(), np.cos(h.double().numpy()), atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_so_and_does_not_spread(isa, bad):
    given = case(40, 8, False)
    given["h"][7, 3] = bad
    got = cosnet(*given.values())
    assert bool(torch.isnan(got[7]).all())
    got[7] = 0
    assert bool(torch.isfinite(got).all())


def test_views_and_other_dtypes_of_parameters_are_taken():
    given = case(50, 8, True)
    wanted = cosnet(*given.values())
    wide = torch.zeros(50, 20)
    wide[:, 5:13] = given["h"]
    given |= {"h": wide[:, 5:13], "mix": given["mix"].T.contiguous().T}
    assert torch.equal(cosnet(*given.values()), wanted)


def test_others_have_no_kernel(monkeypatch):
    assert not has_kernel(torch.zeros(2, 2, dtype=torch.bfloat16)) and not has_kernel(torch.zeros(2, 2).double())
    monkeypatch.setattr(native, "library", lambda: None)
    assert not has_kernel(torch.zeros(2, 2))
