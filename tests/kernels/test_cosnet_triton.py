"""The Triton kernels, interpreted on the CPU, in a process of their own: Triton decides when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

_SCRIPT = """
import torch
from lissom.kernels import cosnet_triton
torch.manual_seed(0)
for tokens, rank, biased in ((1, 1, False), (70, 5, True), (64, 16, False), (130, 33, True), (20000, 4, True)):
    h, gradient = torch.randn(tokens, rank), torch.randn(tokens, rank)
    given = [1 + 0.3 * torch.randn(rank), torch.randn(rank), 1 + 0.3 * torch.randn(rank), torch.randn(rank)]
    given += [torch.randn(rank, rank) / rank**0.5, torch.randn(rank) if biased else None]
    exact = [None if part is None else part.double().requires_grad_() for part in (h, *given)]
    x, o0, p0, o1, p1, mix, bias = exact
    inner = torch.cos(o0 * x + p0) @ mix.T
    value = torch.cos(o1 * (inner if bias is None else inner + bias) + p1)
    value.backward(gradient.double())
    torch.testing.assert_close(cosnet_triton.forward(h, tuple(given)).double(), value.detach(), atol=1e-5, rtol=1e-4)
    again, of_h, vectors, of_mix = cosnet_triton.backward(h, gradient, tuple(given))
    torch.testing.assert_close(again.double(), value.detach(), atol=1e-5, rtol=1e-4)
    found = [of_h, *vectors[:4], of_mix, *([vectors[4]] if biased else [])]
    for got, part in zip(found, [part for part in exact if part is not None], strict=True):
        size = float(part.grad.abs().max()) + 1
        torch.testing.assert_close(got.double(), part.grad, atol=1e-5 * size, rtol=1e-3)
    narrow = cosnet_triton.forward(h.bfloat16(), tuple(given))
    assert narrow.dtype == torch.bfloat16 and float((narrow.double() - value.detach()).abs().max()) < 0.15
print("right")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_values_and_gradients_are_those_of_float64():
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "right", done.stderr[-3000:]
