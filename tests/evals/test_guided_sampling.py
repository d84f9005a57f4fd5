from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pipelines import editing

from lissom.diffusion.demo.pipeline import from_tokens, to_tokens
from lissom.errors import UserError
from lissom.evals.guided_sampling import DPS, ILVR, FlowDPS, Replacement, started

GUIDE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random():
    return torch.Generator().manual_seed(0)


def drawn(pipe, **options):
    latents = torch.randn(2, 16, 48, generator=random())
    sample = pipe(**{"prompt": ["red", "a"], "latents": latents, "num_inference_steps": 10, "output_type": "latent"}
                  | options).images  # fmt: skip
    return from_tokens(sample, 4, 4, 4)


def smaller(pictures):
    return F.avg_pool2d(pictures, 4)


def test_sdedit_begins_at_the_noised_guide():
    noise = torch.randn(2, 16, 48, generator=random())
    arguments = started(to_tokens(GUIDE, 4), noise, 0.5, 5)
    torch.testing.assert_close(arguments["latents"], 0.5 * to_tokens(GUIDE, 4) + 0.5 * noise)
    assert arguments["sigmas"] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    pipe = editing()
    distances = [
        float((drawn(pipe, **started(to_tokens(GUIDE, 4), noise, strength, 10)) - GUIDE).norm())
        for strength in (0.01, 0.3, 1.0)
    ]
    assert distances[0] < 0.1 * distances[2] and distances == sorted(distances)
    with pytest.raises(UserError, match="strength=0"):
        started(GUIDE, GUIDE, 0, 5)


def test_ilvr_keeps_low_frequencies():
    pipe = editing()
    plain = drawn(pipe)
    with ILVR(4)(pipe, GUIDE, random()):
        found = drawn(pipe)

    def distance(pictures):
        return F.interpolate(pictures - GUIDE, scale_factor=0.25, mode="bicubic", antialias=True).norm()

    assert distance(found) < 0.3 * distance(plain)
    with ILVR(4, until=2.0)(pipe, GUIDE, random()):
        torch.testing.assert_close(drawn(pipe), plain)


def test_replacement_keeps_what_is_known():
    pipe, known = editing(), torch.zeros(1, 1, 16, 16)
    known[..., :7] = 1
    with Replacement()(pipe, GUIDE, known, random()):
        found = drawn(pipe)
    torch.testing.assert_close(found[..., :7], GUIDE[..., :7])
    assert (found[..., 7:] - GUIDE[..., 7:]).abs().mean() > 0.1


@pytest.mark.parametrize("method", ["FlowDPS", "DPS"])
def test_posterior_sampling_draws_what_measures_alike(method):
    pipe, measured = editing(), smaller(GUIDE)
    plain = drawn(pipe)
    made = FlowDPS(1.0)(pipe, measured, smaller, random()) if method == "FlowDPS" else DPS(4.0)(pipe, measured, smaller)
    with made:
        found = drawn(pipe)
    assert (smaller(found) - measured).norm() < 0.5 * (smaller(plain) - measured).norm()
    torch.testing.assert_close(drawn(pipe), plain)
