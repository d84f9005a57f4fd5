"""References of other families, kept for some steps."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from pipelines import editing

from lissom.diffusion.klein_kv import KleinKV
from lissom.errors import UserError


class Pipeline:
    """A pipeline is only asked for its transformer."""

    def __init__(self, transformer):
        self.transformer = transformer


def flux():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    ids = torch.cat([torch.cartesian_prod(torch.tensor([own]), torch.arange(4), torch.arange(4)) for own in (0, 1)])
    given = {"pooled_projections": torch.zeros(1, 32), "txt_ids": torch.zeros(5, 3), "img_ids": ids.float()}
    return transformer, given


def qwen():
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = {
        "img_shapes": [[(1, 4, 4), (1, 4, 4)]], "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 0]]),
    }  # fmt: skip
    return transformer, given


def velocities(transformer, given, steps, scale=1.0):
    """Of steps that differ in noise and time; the last tokens are references."""
    random = torch.Generator().manual_seed(0)
    text, references, noise = (
        torch.randn(1, count, width, generator=random) for count, width in ((5, 32), (16, 16), (16, 16))
    )
    found = []
    with torch.no_grad():
        for step in range(steps):
            sample = noise * (1 - scale * step / 20)
            output = transformer(
                hidden_states=torch.cat([sample, references], 1), encoder_hidden_states=text, return_dict=False,
                timestep=torch.tensor([1 - scale * step / 20]), **given,
            )[0]  # fmt: skip
            found.append(output[:, :16])
    return found


@pytest.mark.parametrize("make", [flux, qwen])
def test_it_is_exact_while_nothing_changes_and_close_when_little_does(make):
    transformer, given = make()
    whole = velocities(transformer, given, 4, scale=0.0)
    with KleinKV(mode="approximate")(Pipeline(transformer)) as report:
        found = velocities(transformer, given, 4, scale=0.0)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    assert (report.reference_passes, report.cached_passes) == (1, 3) and report.damage < 1e-5
    whole = velocities(transformer, given, 6)
    with KleinKV(mode="approximate")(Pipeline(transformer)) as report:
        found = velocities(transformer, given, 6)
    gaps = [float((one - other).norm() / other.norm()) for one, other in zip(found, whole, strict=True)]
    assert gaps[0] == 0 < gaps[1] < gaps[5] < 0.5 and report.damage == pytest.approx(gaps[1], rel=1e-3)
    with KleinKV(mode="approximate", refresh_every=2)(Pipeline(transformer)) as report:
        found = velocities(transformer, given, 6)
    assert (report.reference_passes, report.cached_passes) == (3, 3)
    assert max(float((one - other).norm() / other.norm()) for one, other in zip(found, whole, strict=True)) < gaps[5]
    with KleinKV(mode="approximate")(Pipeline(transformer)) as report:
        for _ in range(2):
            velocities(transformer, given, 3)
    assert (report.reference_passes, report.cached_passes) == (2, 4)  # a new request begins with a whole pass
    for one, other in zip(velocities(transformer, given, 2), whole[:2], strict=True):
        assert torch.equal(one, other)


def test_what_was_made_for_another_request_is_not_used():
    transformer, given = flux()
    other = given | {"pooled_projections": torch.ones(1, 32)}
    wanted = velocities(transformer, other, 1)
    with KleinKV(mode="approximate")(Pipeline(transformer)) as report:
        velocities(transformer, given, 1)
        found = velocities(transformer, other, 1)
    assert report.reference_passes == 2 and torch.equal(found[0], wanted[0])


def test_what_it_is_not_for():
    with pytest.raises(UserError, match="has no FluxTransformer2DModel"), KleinKV(mode="approximate")(editing()):
        pass
    with pytest.raises(UserError, match="has no FLUX"), KleinKV()(Pipeline(flux()[0])):
        pass
    with pytest.raises(UserError, match="cannot read references before"):
        KleinKV(mode="approximate").prefill(Pipeline(flux()[0]), None)
    for bad in ({"mode": "near"}, {"refresh_every": 3}, {"mode": "approximate", "refresh_every": 1}):
        with pytest.raises(UserError, match=r"expected|should be"):
            KleinKV(**bad)
    with pytest.raises(UserError, match="leave out storage"):
        KleinKV(mode="approximate", storage="int8")
