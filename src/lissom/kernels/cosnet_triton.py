"""CosNet's two cosines and the matrix between them on a GPU, in Triton: one pass over the tokens each way.

With `TRITON_INTERPRET=1`, set before Triton is imported, the kernels run on the CPU, slowly: so they are tested.
"""

# mypy: disable-error-code="no-untyped-def,no-any-return,import-untyped,import-not-found"
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

_TOKENS = 64  # of a tile
_PROGRAMS = 264  # that the backward pass shares the tiles out to: two for each multiprocessor of a large GPU
_WIDENED = os.environ.get("TRITON_INTERPRET") == "1"  # the interpreter's products of bf16 are wrong


@triton.jit
def _vector(base, channel, rank):
    return tl.load(base + channel, mask=channel < rank, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _product(left, right, NARROW: tl.constexpr):
    """In the dtype of the tokens, as other products are, with sums of fp32."""
    return tl.dot(left.to(NARROW), right.to(NARROW), input_precision="ieee")


@triton.jit
def _forward(
    h, omega_0, phi_0, omega_1, phi_1, mix, bias, value, tokens, rank,
    R: tl.constexpr, TOKENS: tl.constexpr, BIASED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, R)
    real = (token < tokens)[:, None] & (channel < rank)[None, :]
    place = token[:, None].to(tl.int64) * rank + channel[None, :]
    square = (channel < rank)[:, None] & (channel < rank)[None, :]
    x = tl.load(h + place, mask=real, other=0.0).to(tl.float32)
    inner = tl.cos(x * _vector(omega_0, channel, rank) + _vector(phi_0, channel, rank))
    turned = tl.load(mix + channel[None, :] * rank + channel[:, None], mask=square, other=0.0)  # [inputs, outputs]
    mixed = _product(inner, turned, NARROW)
    if BIASED:
        mixed += _vector(bias, channel, rank)
    outer = tl.cos(mixed * _vector(omega_1, channel, rank) + _vector(phi_1, channel, rank))
    tl.store(value + place, outer.to(value.dtype.element_ty), mask=real)


@triton.jit
def _backward(
    h, gradient, omega_0, phi_0, omega_1, phi_1, mix, bias, value, of_h, vectors, of_mix, tokens, rank,
    R: tl.constexpr, TOKENS: tl.constexpr, BIASED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    program, channel = tl.program_id(0), tl.arange(0, R)
    square = (channel < rank)[:, None] & (channel < rank)[None, :]
    first_omega, first_phi = _vector(omega_0, channel, rank), _vector(phi_0, channel, rank)
    second_omega, second_phi = _vector(omega_1, channel, rank), _vector(phi_1, channel, rank)
    matrix = tl.load(mix + channel[:, None] * rank + channel[None, :], mask=square, other=0.0)  # [outputs, inputs]
    sums = tl.zeros((R, R), tl.float32)
    of_omega_0 = tl.zeros((R,), tl.float32)
    of_phi_0 = tl.zeros((R,), tl.float32)
    of_omega_1 = tl.zeros((R,), tl.float32)
    of_phi_1 = tl.zeros((R,), tl.float32)
    of_bias = tl.zeros((R,), tl.float32)
    for tile in range(program, tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        token = tile * TOKENS + tl.arange(0, TOKENS)
        real = (token < tokens)[:, None] & (channel < rank)[None, :]
        place = token[:, None].to(tl.int64) * rank + channel[None, :]
        x = tl.load(h + place, mask=real, other=0.0).to(tl.float32)
        flow = tl.load(gradient + place, mask=real, other=0.0).to(tl.float32)
        angle = x * first_omega + first_phi
        inner = tl.cos(angle)
        mixed = _product(inner, tl.trans(matrix), NARROW)
        if BIASED:
            mixed += _vector(bias, channel, rank)
        second = mixed * second_omega + second_phi
        tl.store(value + place, tl.cos(second).to(value.dtype.element_ty), mask=real)
        down = -tl.sin(second) * flow
        of_omega_1 += tl.sum(down * mixed, 0)
        of_phi_1 += tl.sum(down, 0)
        flow = down * second_omega
        of_bias += tl.sum(flow, 0)
        sums += _product(tl.trans(flow), inner, NARROW)
        down = -tl.sin(angle) * _product(flow, matrix, NARROW)
        of_omega_0 += tl.sum(down * x, 0)
        of_phi_0 += tl.sum(down, 0)
        tl.store(of_h + place, (down * first_omega).to(of_h.dtype.element_ty), mask=real)
    own = vectors + program * 5 * rank + channel
    there = channel < rank
    tl.store(own, of_omega_0, mask=there)
    tl.store(own + rank, of_phi_0, mask=there)
    tl.store(own + 2 * rank, of_omega_1, mask=there)
    tl.store(own + 3 * rank, of_phi_1, mask=there)
    tl.store(own + 4 * rank, of_bias, mask=there)
    tl.store(of_mix + program * rank * rank + channel[:, None] * rank + channel[None, :], sums, mask=square)


def forward(h: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """See `lissom.kernels.cosnet.cosnet`; `parameters` are omega_0, phi_0, omega_1, phi_1, mix and its bias or None."""
    value = torch.empty_like(h)
    tokens, rank = h.shape
    _forward[(triton.cdiv(tokens, _TOKENS),)](h, *_given(parameters), value, tokens, rank, **_options(h, parameters))
    return value


def backward(
    h: torch.Tensor, gradient: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `forward` gave, the gradient of `h`, `[5, rank]` gradients of omega_0, phi_0, omega_1, phi_1 and the bias,
    and that of the matrix."""
    value, of_h = torch.empty_like(h), torch.empty_like(h)
    tokens, rank = h.shape
    programs = min(triton.cdiv(tokens, _TOKENS), _PROGRAMS)
    vectors = torch.empty(programs, 5, rank, device=h.device)
    of_mix = torch.empty(programs, rank, rank, device=h.device)
    _backward[(programs,)](
        h, gradient, *_given(parameters), value, of_h, vectors, of_mix, tokens, rank, **_options(h, parameters)
    )
    return value, of_h, vectors.sum(0), of_mix.sum(0)


def _given(parameters: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(parameters[4] if part is None else part for part in parameters)  # what is not there is not read


def _options(h: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]) -> dict[str, object]:
    wide = max(16, triton.next_power_of_2(h.shape[1]))
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(h.dtype, tl.float32)
    return {
        "R": wide, "TOKENS": _TOKENS, "BIASED": parameters[5] is not None,
        "NARROW": tl.float32 if _WIDENED else narrow, "num_warps": 4 if wide < 128 else 8,
    }  # fmt: skip
