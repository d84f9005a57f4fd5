"""What is searched for a diffusion model."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    UNet2DModel,
)
from pipelines import editing, small_emoji

from lissom.diffusion.calls import arguments, own_size
from lissom.errors import UserError
from lissom.evolve import pipelines
from lissom.evolve.pipelines import recipes, requests


@pytest.fixture
def kontext(monkeypatch):
    """A pipeline of FLUX.1 without encoders of text."""
    monkeypatch.setattr(pipelines, "load_emoji", lambda size: small_emoji())
    transformer = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=1, block_out_channels=(4,), norm_num_groups=2)
    return FluxKontextPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)


def labels(pipe, refine=False):
    return [recipe.label for recipe in recipes("x", pipe, refine, quick=True)]


def test_every_family_has_what_acts_on_it(kontext):
    assert labels(editing("set"))[:3] == ["20 steps", "20 steps + klein-kv", "20 steps + klein-kv (storage=int8)"]
    assert labels(editing("joint")) == ["20 steps", "8 steps", "4 steps"]
    assert "28 steps + klein-kv (mode=approximate, refresh_every=3)" in labels(kontext)
    assert labels(editing("joint"), refine=True) == [f"{steps} steps + h-transform" for steps in (20, 8, 4)]


def test_requests_are_what_a_pipeline_takes(kontext):
    own = requests(editing("set"), False, 4)
    assert [len(request.references) for request in own] == [1, 2, 1, 2]  # by a word, and by an example
    assert all(len(request.references) == 1 for request in requests(kontext, False, 4))
    coarse = requests(editing("set"), True, 4)
    assert all(request.guide.size == (16, 16) and not request.references for request in coarse)


def test_calls_are_given_what_they_take(kontext):
    pipe = editing()
    assert arguments(pipe, prompt="", image=None, height=16) == {"prompt": "", "height": 16}
    with pytest.raises(UserError, match="takes no mask_image"):
        arguments(pipe, mask_image=torch.zeros(1))
    plain = DDPMPipeline(UNet2DModel(sample_size=(16, 32), block_out_channels=(4, 4), norm_num_groups=2,
                                     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2),
                         DDPMScheduler())  # fmt: skip
    assert own_size(plain) == (32, 16) and own_size(pipe) is None and not arguments(plain, width=32, height=16)
    with pytest.raises(UserError, match="draws pictures of 32 by 16 pixels alone"):
        arguments(plain, width=16, height=16)
    assert requests(plain, True, 1)[0].guide.size == (32, 16)


def test_what_an_autoencoder_makes_is_no_size(kontext):
    assert own_size(kontext) is None


def test_a_call_that_cannot_be_made_is_told():
    class Needs:
        def __call__(self, image, mask_image, strength=0.5):
            pass

    with pytest.raises(UserError, match="Needs needs mask_image"):
        arguments(Needs(), image=1)
