"""Against brackets and Brent's method in many digits on the published form of `g`, and against whole distributions."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from lissom.errors import UserError
from lissom.rl.band import BandConfig, band
from lissom.rl.band.bounds import logit_bounds, ratio_bounds
from lissom.rl.band.divergences import DIVERGENCES, of_function

DOUBLE = torch.float64

FUNCTIONS = {
    "kl": lambda u: -mpmath.log(u) + u - 1 if u > 0 else mpmath.inf,
    "tv": lambda u: abs(u - 1) / 2,
    "chi-square": lambda u: (u - 1) ** 2,
    "reverse-kl": lambda u: (u * mpmath.log(u) if u > 0 else 0) - u + 1,
    "hellinger": lambda u: (mpmath.sqrt(u) - 1) ** 2,
}
# [lower, upper] at a radius of 0.05, to the digits that are shown
KNOWN = {
    "kl": {
        0.01: (0.0025, 7.810), 0.05: (0.1620, 2.981), 0.1: (0.3128, 2.201), 0.5: (0.6915, 1.3085),
        0.9: (0.8666, 1.0764),
    },
    "chi-square": {0.05: (0.0253, 1.975), 0.1: (0.3292, 1.671), 0.5: (0.7764, 1.2236), 0.9: (0.9255, 1.0745)},
    "tv": {0.01: (0, 6), 0.08: (0.375, 1.625), 0.5: (0.9, 1.1), 0.9: (0.9444, 1.0556)},
}  # fmt: skip


def g(name: str, p: float, rest: float, q: float, other: float) -> mpmath.mpf:
    f = FUNCTIONS[name]
    return p * f(q / p) + rest * f(other / rest)


def from_ends(p: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """p and 1 - p, in 60 digits, from the double log p."""
    p = mpmath.e ** mpmath.mpf(p)
    return p, 1 - p


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("radius", [1e-4, 0.05, 0.4])
def test_they_solve_the_equation(name, radius):
    """g = radius to 1e-8 over p from 1e-6 to 1 - 1e-6, in 60 digits; where a bound is an end, g is below the radius."""
    half = np.logspace(-6, math.log10(0.5), 15)
    logs = np.concatenate([np.log(half), np.log1p(-half)])
    lower, upper = logit_bounds(torch.from_numpy(logs), name, radius)
    with mpmath.workdps(60):
        for log, *logits in zip(logs.tolist(), lower.tolist(), upper.tolist(), strict=True):
            p, rest = from_ends(log)
            for logit in logits:
                if math.isinf(logit):
                    q, other = (1, 0) if logit > 0 else (0, 1)
                    assert g(name, p, rest, q, other) <= radius + 1e-12
                    continue
                q, other = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(mpmath.mpf(logit)))
                assert abs(g(name, p, rest, q, other) - radius) < 1e-8, (log, logit)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_against_brent(name):
    radius = 0.05
    for p in (1e-4, 0.003, 0.07, 0.3, 0.5, 0.8, 0.97):
        lower, upper = (float(bound) for bound in ratio_bounds(torch.tensor(p, dtype=DOUBLE).log(), name, radius))

        def excess(r: float, p=p) -> float:
            return float(g(name, p, 1 - p, r * p, 1 - r * p)) - radius

        low = brentq(excess, 1e-300, 1) if excess(1e-300) > 0 else 0.0
        high = brentq(excess, 1, (1 - 1e-15) / p) if excess((1 - 1e-15) / p) > 0 else 1 / p
        assert lower == pytest.approx(low, abs=1e-9)
        assert upper == pytest.approx(high, rel=1e-9)


@pytest.mark.parametrize(("name", "p", "bounds"), [(n, p, b) for n, known in KNOWN.items() for p, b in known.items()])
def test_known_values(name, p, bounds):
    found = band(torch.tensor(p).log(), name, 0.05)
    assert [float(bound) for bound in found] == pytest.approx(bounds, abs=6e-4, rel=6e-4)


@pytest.mark.parametrize(("name", "lowest"), [("kl", math.exp(-0.05)), ("tv", 0.95), ("chi-square", 1.0)])
def test_limits_of_a_certain_token(name, lowest):
    for log in (-1e-13, -0.0):
        lower, upper = ratio_bounds(torch.tensor([log], dtype=DOUBLE), name, 0.05)
        assert float(lower) == pytest.approx(lowest, abs=1e-5)
        assert float(upper) == pytest.approx(1, abs=1e-12)


def test_limits_of_a_rare_token():
    """p (u - 1) does not vanish with p: 1 - exp(-radius) for KL, the radius for TV."""
    logs = torch.tensor([-30.0, -80.0, -300.0], dtype=DOUBLE)
    for name, room in (("kl", 1 - math.exp(-0.05)), ("tv", 0.05), ("hellinger", 0.05 - 0.05**2 / 4)):
        assert torch.allclose(
            ratio_bounds(logs, name, 0.05)[1] * logs.exp(), torch.tensor(room, dtype=DOUBLE), rtol=1e-5
        )


@given(
    name=st.sampled_from(sorted(FUNCTIONS)),
    logits=st.lists(st.floats(-12, 6), min_size=2, max_size=12),
    radius=st.floats(1e-3, 0.5),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_no_distribution_in_the_region_leaves_the_band(name, logits, radius, seed):
    """Random distributions over the vocabulary, pulled towards the old one until they are on the region's edge."""
    random = np.random.default_rng(seed)
    old = np.exp(logits - np.logaddexp.reduce(logits))
    f = np.vectorize(lambda u: float(FUNCTIONS[name](u)))
    lower, upper = (bound.numpy() for bound in ratio_bounds(torch.from_numpy(np.log(old)), name, radius))
    for _ in range(4):
        wild = random.dirichlet(np.full(len(old), random.choice([0.1, 1.0])))

        def inside(share: float, wild=wild) -> bool:
            mixed = (1 - share) * old + share * wild
            return float((old * f(mixed / old)).sum()) <= radius

        low, high = 0.0, 1.0
        for _ in range(40):
            low, high = ((low + high) / 2, high) if inside((low + high) / 2) else (low, (low + high) / 2)
        ratio = ((1 - low) * old + low * wild) / old
        assert (ratio >= lower - 1e-7).all()
        assert (ratio <= upper * (1 + 1e-7)).all()


@given(log=st.floats(-40, -1e-6), radius=st.floats(1e-3, 0.5), name=st.sampled_from(sorted(FUNCTIONS)))
@settings(max_examples=200, deadline=None)
def test_they_are_ratios_of_probabilities(log, radius, name):
    lower, upper = (float(bound) for bound in ratio_bounds(torch.tensor(log, dtype=DOUBLE), name, radius))
    wider = [float(bound) for bound in ratio_bounds(torch.tensor(log, dtype=DOUBLE), name, radius * 1.5)]
    assert 0 <= lower <= 1 <= upper <= math.exp(-log) * (1 + 1e-12)
    assert wider[0] <= lower + 1e-12
    assert wider[1] >= upper * (1 - 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_ones_own_gives_the_same(name):
    torch_functions = {
        "kl": lambda u: u - 1 - u.log(),
        "tv": lambda u: (u - 1).abs() / 2,
        "chi-square": lambda u: (u - 1).square(),
        "reverse-kl": lambda u: torch.special.xlogy(u, u) - u + 1,
        "hellinger": lambda u: (u.sqrt() - 1).square(),
    }
    logs = torch.linspace(-14, -1e-3, 400).double()
    own = of_function(torch_functions[name], name)
    for mine, theirs in zip(ratio_bounds(logs, own, 0.05), ratio_bounds(logs, name, 0.05), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-7, atol=1e-9)
    assert torch.allclose(band(logs, torch_functions[name], 0.05)[0], band(logs, name, 0.05, exact=True)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda u: u, "at a ratio of 1"),
        (lambda u: -((u - 1) ** 2), "not convex"),
        (lambda u: u.log() * 0 + (u - 1) ** 2, "one number for each"),  # NaN at 0
        (lambda u: (u - 1).sum(), "one number for each"),
    ],
)
def test_a_function_that_is_no_divergence(function, complaint):
    with pytest.raises(UserError, match=complaint):
        band(torch.tensor([-1.0]), function)


def test_what_is_no_probability():
    logs = torch.tensor([math.nan, 1e-7, -math.inf, -1.0])
    lower, upper = ratio_bounds(logs, "kl", 0.05)
    assert lower.isnan().tolist() == upper.isnan().tolist() == [True, False, False, False]
    assert float(upper[1]) == 1
    assert float(lower[2]) == 0
    assert band(torch.empty(0), "kl", 0.05)[0].shape == (0,)


def test_no_gradient_goes_through():
    logs = torch.tensor([-1.0, -3.0], requires_grad=True)
    for exact in (False, True):
        assert not any(bound.requires_grad for bound in band(logs, exact=exact))


def test_cap_and_relax():
    logs = torch.tensor([1e-4, 0.3, 0.999]).log()
    plain = band(logs, exact=True)
    for exact in (False, True):
        lower, upper = band(logs, cap=10, relax=(0.2, 0.28), exact=exact)
        assert torch.allclose(upper, torch.maximum(plain[1], torch.tensor(1.28)).clamp(max=10), rtol=1e-3)
        assert torch.allclose(lower, plain[0].clamp(max=0.8), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"radius": 0.0}, "radius=0.0"),
        ({"radius": math.nan}, "radius=nan"),
        ({"divergence": "wasserstein"}, "expected kl, tv"),
        ({"cap": 1.0}, "cap=1.0"),
        ({"relax": (2.0, 0.1)}, "relax"),
    ],
)
def test_settings_out_of_range(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        BandConfig(**settings)


def test_every_divergence_is_tried_here():
    assert set(FUNCTIONS) == set(DIVERGENCES)
