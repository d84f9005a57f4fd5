from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from pipelines import editing, pictures

from lissom.diffusion.pictures import to_picture, to_pixels
from lissom.errors import UserError


@pytest.mark.parametrize(
    "options,words",
    [
        ({"num_inference_steps": 0}, "expected at least 1"),
        ({"num_images_per_prompt": 0}, "expected at least 1"),
        ({"height": 0}, "no multiple of 4"),
        ({"width": 18}, "no multiple of 4"),
        ({"prompt": []}, "There is no prompt"),
        ({"prompt": ["a", "red"], "negative_prompt": ["a"] * 3, "guidance_scale": 2.0}, "3 negative prompts for 2"),
        ({"image": []}, "0 references"),
        ({"image": "one.png"}, "expected a picture"),
        ({"image": Image.new("RGB", (3, 16))}, "smaller than a token"),
        ({"image": Image.new("I;16", (16, 16))}, "more than 8 bits"),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        editing()(**options)


def test_words_can_be_given_as_vectors():
    pipe = editing()
    options = {"guidance_scale": 3.0, "num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "latent"}
    latents = torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(0))
    wanted = pipe(prompt=["a", "red"], latents=latents, **options).images
    found = pipe(prompt_embeds=pipe.encode_prompt(["a", "red"]), latents=latents, **options).images
    assert torch.equal(found, wanted) and len(found) == 4


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchLCMScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_it_samples_with_any_scheduler_of_flows(scheduler):
    pipe = editing()
    call = {"prompt": "red", "output_type": "latent", "num_inference_steps": 40}
    wanted = pipe(generator=torch.Generator().manual_seed(0), **call).images
    pipe.scheduler = scheduler
    found = pipe(generator=torch.Generator().manual_seed(0), **call).images
    assert found.isfinite().all() and found.shape == wanted.shape
    if not isinstance(scheduler, FlowMatchLCMScheduler):  # which is stochastic; the others follow the same path
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_schedulers_of_other_models_are_refused():
    pipe = editing()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler does not sample flows"):
        pipe()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UserError, match="leave out `sigmas`"):
        pipe(sigmas=[1.0, 0.5])


def test_words_that_are_not_known_are_told():
    with pytest.warns(UserWarning, match=r"never seen the words Blümchen, rouge\.$"):
        editing().encode_prompt(["a red thing", "Blümchen rouge red"])
    with warnings.catch_warnings(action="error"):
        editing().encode_prompt(["A RED thing", ""])


def test_pictures_of_any_kind_are_seen_on_white():
    (picture,) = pictures(1)
    assert np.array_equal(np.asarray(to_picture(to_pixels(picture))), np.asarray(picture))
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (to_pixels(clear) == 1).all()
    half = to_pixels(Image.new("LA", (16, 16), (0, 128)))
    assert abs(float(half.mean())) < 0.01
    marked = Image.new("P", (16, 16), 0)
    marked.info["transparency"] = 0
    assert (to_pixels(marked) == 1).all()
    assert to_pixels(Image.new("1", (8, 8), 1)).shape == (3, 8, 8)


def test_references_of_more_pixels_than_the_pipelines_are_made_smaller():
    pipe = editing()  # of 16 by 16
    rows, columns = np.mgrid[:16, :16]
    small = Image.fromarray(np.stack([rows * 16, columns * 16, rows + columns], 2).astype(np.uint8))
    large = small.resize((160, 160), Image.Resampling.NEAREST)
    wide = small.resize((256, 64), Image.Resampling.NEAREST)
    tokens, _, lengths = pipe.encode_images([small, large, wide])
    assert lengths == [16, 16, 16]
    ours, theirs = tokens[0, :16], tokens[0, 16:32]
    assert float((ours - theirs).abs().max()) < 0.05  # blocks of 10 pixels become the pixels that they are of
