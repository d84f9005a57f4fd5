from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from pipelines import editing

from lissom.diffusion.h_transform import HTransform
from lissom.errors import UserError


def guide(side=16, seed=0, width=None):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (side, width or side, 3), dtype=np.uint8))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(scheduler, kind=DDIMPipeline, channels=3):
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=16, block_out_channels=(32,), down_block_types=("DownBlock2D",), layers_per_block=1,
                       up_block_types=("UpBlock2D",), out_channels=channels)  # fmt: skip
    return quiet(kind(unet, scheduler))


def stable(scheduler):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2,
    )  # fmt: skip
    return quiet(
        StableDiffusionPipeline(
            vae, None, None, unet, scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    )


def flux():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, shift_factor=0.1, scaling_factor=0.4,
    )  # fmt: skip
    return quiet(FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer))


def klein():
    torch.manual_seed(0)
    return quiet(
        Flux2KleinPipeline(
            vae=AutoencoderKLFlux2(
                block_out_channels=(8, 8),
                latent_channels=4,
                norm_num_groups=2,
                layers_per_block=1,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
            ),
            transformer=Flux2Transformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
            text_encoder=None,
            tokenizer=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    )  # fmt: skip


def latents_of(pipe, side=16, **options):
    """Behind the last step."""
    random, seen = torch.Generator().manual_seed(0), []
    width = 16 if hasattr(pipe, "unet") else 32
    pipe(
        prompt_embeds=torch.randn(1, 3, width, generator=random), height=side, width=side, output_type="latent",
        generator=random, num_inference_steps=4, **options,
        callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(tensors["latents"]) or {},
    )  # fmt: skip
    return seen[-1]


CASES = {
    "editing": (editing, {}),
    "klein": (klein, {"guidance_scale": 1.0}),
    "flux": (flux, {"pooled_prompt_embeds": torch.zeros(1, 32)}),
    "stable ddim": (lambda: stable(DDIMScheduler(prediction_type="v_prediction")), {"guidance_scale": 1.0}),
    "stable euler": (lambda: stable(EulerDiscreteScheduler()), {"guidance_scale": 1.0}),
    "stable unipc": (lambda: stable(UniPCMultistepScheduler()), {"guidance_scale": 1.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_alpha_leads_from_the_guide_to_the_plain_sampler(case):
    make, options = CASES[case]
    pipe, side = make(), 32
    wanted = latents_of(pipe, side, **options)
    with HTransform(alpha=float("inf"))(pipe, guide(side)):
        torch.testing.assert_close(latents_of(pipe, side, **options), wanted)
    distances = []
    for alpha in (0.0, 1.0, 8.0):
        with HTransform(alpha=alpha, level="flow")(pipe, guide(side)):
            found = latents_of(pipe, side, **options)
        with HTransform(alpha=0.0)(pipe, found if alpha == 0 else guide(side)):
            known = latents_of(pipe, side, **options)  # the guide as this pipeline's latents
        distances.append(float((found - known).norm() / wanted.norm()))
    assert distances[0] < (0.05 if case == "stable ddim" else 2e-3) and distances[0] < distances[1] < distances[2]
    torch.testing.assert_close(latents_of(pipe, side, **options), wanted)


def test_of_pixels_the_guide_itself_comes_back():
    wanted = np.asarray(guide())
    for pipe in (
        pixels(DDIMScheduler()), pixels(DDPMScheduler(), DDPMPipeline),
        pixels(DDPMScheduler(variance_type="learned_range"), DDPMPipeline, channels=6),
    ):  # fmt: skip
        with HTransform(alpha=0)(pipe, guide()):
            found = np.asarray(pipe(num_inference_steps=5).images[0])
        assert np.abs(found.astype(int) - wanted).max() <= 1
    pipe = editing()
    with HTransform(alpha=0)(pipe, guide()):
        found = np.asarray(pipe(prompt="red", num_inference_steps=3, guidance_scale=3.0).images[0])
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("level,alpha", [("flow", 2.0), ("vp", 5.0)])
def test_a_trajectory_is_that_of_the_formula(level, alpha):
    """Against Euler steps in float64; to a velocity λ((x − y)/σ − v) is added, as the paper has it for flows."""
    pipe, seen = editing(), []
    own = pipe.transformer.forward

    def keep(*args, **kwargs):
        output = own(*args, **kwargs)
        seen.append((kwargs["hidden_states"].double(), output[0].double()))
        return output

    pipe.transformer.forward = keep
    latents = torch.randn(1, 16, 48, generator=torch.Generator().manual_seed(0))
    with HTransform(alpha, level)(pipe, guide()):
        found = pipe(prompt="red", latents=latents, num_inference_steps=4, output_type="latent").images
    wanted = torch.from_numpy(np.array(guide())).permute(2, 0, 1).double()[None] / 127.5 - 1
    wanted = torch.nn.functional.pixel_unshuffle(wanted, 4).flatten(2).transpose(1, 2)
    sample = latents.double()
    for step, (given, velocity) in enumerate(seen):
        torch.testing.assert_close(given, sample, atol=1e-5, rtol=1e-5)
        sigma = 1 - step / 4
        strength = (sigma if level == "flow" else sigma / np.hypot(sigma, 1 - sigma)) ** alpha
        velocity = velocity + strength * ((sample - wanted) / sigma - velocity)
        sample = sample - velocity / 4
    torch.testing.assert_close(found.double(), sample, atol=1e-5, rtol=1e-5)


def test_noise_is_moved_as_the_paper_has_it_for_images():
    """ε' = ε + λ((x − a y)/b − ε), with λ = b^α."""
    pipe, seen = pixels(DDIMScheduler()), []
    scheduler = pipe.scheduler

    class Kept(DDIMScheduler):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            seen.append((model_output, timestep, sample))
            return super().step(model_output, timestep, sample, *args, **kwargs)

    pipe.scheduler = Kept.from_config(scheduler.config)
    plain = pipe.unet.forward
    outputs = []
    pipe.unet.forward = lambda *a, **k: outputs.append(plain(*a, **k)) or outputs[-1]
    with HTransform(5.0)(pipe, guide()):
        pipe(num_inference_steps=5)
    wanted = torch.from_numpy(np.array(guide())).permute(2, 0, 1).double()[None] / 127.5 - 1
    for (moved, timestep, sample), output in zip(seen, outputs, strict=True):
        product = float(scheduler.alphas_cumprod[timestep])
        a, b = product**0.5, (1 - product) ** 0.5
        noise = output.sample.double()
        expected = noise + b**5 * ((sample.double() - a * wanted) / b - noise)
        torch.testing.assert_close(moved.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["editing", "klein", "flux", "stable ddim"])
def test_masks_divide_what_is_drawn_into_regions(case):
    make, options = CASES[case]
    pipe, side = make(), 32
    mask = np.zeros((side, side), np.uint8)
    mask[:, : side // 2] = 255
    mask = Image.fromarray(mask)
    with HTransform(alpha=0.0, outside=0.0)(pipe, guide(side), mask):
        both = latents_of(pipe, side, **options)
    with HTransform(alpha=0.0)(pipe, guide(side)):
        torch.testing.assert_close(both, latents_of(pipe, side, **options))
    with HTransform(alpha=0.0)(pipe, guide(side), mask):
        found = latents_of(pipe, side, **options)
    if found.ndim == 3:
        rows = int(found.shape[1] ** 0.5)
        found, both = (tokens.unflatten(1, (rows, rows)).permute(0, 3, 1, 2) for tokens in (found, both))
    inside, outside = (found - both).abs().split(found.shape[3] // 2, 3)
    assert inside.max() < 1e-4 < 0.05 < outside.mean()


def test_a_step_without_noise_is_left_alone():
    pipe = editing()
    with HTransform(2.0)(pipe, guide()):
        found = pipe(prompt="red", sigmas=[1.0, 0.5, 0.0], output_type="latent").images
    assert found.isfinite().all()


def test_a_guide_for_each_picture():
    pipe = editing()
    with HTransform(alpha=0)(pipe, [guide(), guide(seed=1)]):
        found = pipe(prompt=["red", "a thing"], num_images_per_prompt=2, num_inference_steps=2).images
    for number, picture in enumerate(found):
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(guide(seed=number // 2))).max() <= 1


def test_what_does_not_fit_is_refused():
    pipe = editing()
    for bad, words in (
        (guide(20), "give one of the size"), (torch.full((1, 16, 48), float("nan")), "not finite"),
        ([guide()] * 3, "for all pictures or for each"), ("guide.png", "expected a picture"),
        (Image.new("RGB", (18, 16)), "one colour"), (guide(15), "does not fit"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words), HTransform()(pipe, bad):
            pipe(prompt=["red"] * 2, num_inference_steps=2)
    for mask, words in ((guide(20), "does not fit"), (guide(32, width=8), "does not fit"), ("mask", "a mask is")):
        with pytest.raises(UserError, match=f"(?i){words}"), HTransform()(pipe, guide(), mask):
            pipe(prompt="red", num_inference_steps=2)
    for bad in ([], [guide(), guide(20)]):
        with pytest.raises(UserError, match="several of one size"), HTransform()(pipe, bad):
            pipe(prompt="red", num_inference_steps=2)
    with pytest.raises(UserError, match="more than 8 bits"), HTransform()(pipe, Image.new("I;16", (16, 16))):
        pass
    with pytest.raises(UserError, match="alpha='5'"):
        HTransform(alpha="5")
    with pytest.raises(UserError, match="alpha=-1"):
        HTransform(alpha=-1)
    with pytest.raises(UserError, match="level='ve'"):
        HTransform(level="ve")
    with pytest.raises(UserError, match="alpha=nan"):
        HTransform(alpha=float("nan"))
    with HTransform()(pipe, guide()), pytest.raises(UserError, match="hold of this"), HTransform()(pipe, guide()):
        pass
