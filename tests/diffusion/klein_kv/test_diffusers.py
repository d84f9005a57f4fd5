"""Klein KV in diffusers' own pipelines, beside diffusers' own cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image

from lissom.diffusion.denoiser import fingerprint
from lissom.diffusion.klein_kv import KleinKV
from lissom.errors import UserError


def made(kind):
    torch.manual_seed(0)
    pipe = kind(
        vae=AutoencoderKLFlux2(
            block_out_channels=(8, 8), latent_channels=4, norm_num_groups=2, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        transformer=Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        ),
        text_encoder=None, tokenizer=None, scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, count=2, prompts=1, **options):
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(0, 256, (64, 64 + 32 * number, 3), dtype=np.uint8)) for number in range(count)
    ]
    words = torch.randn(prompts, 5, 32, generator=torch.Generator().manual_seed(1))
    return pipe(
        images, prompt_embeds=words, height=64, width=64, num_inference_steps=4, output_type="latent",
        generator=torch.Generator().manual_seed(0), **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("prompts", [1, 2])
def test_it_draws_what_diffusers_own_cache_does(count, prompts):
    pipe = made(Flux2KleinKVPipeline)
    wanted = drawn(pipe, count, prompts)
    with KleinKV()(pipe) as report:
        found = [drawn(pipe, count, prompts) for _ in range(2)]
    for one in found:
        torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)
    assert (report.reference_passes, report.cached_passes) == (1, 8 - (prompts == 1))  # which reads in its first step
    assert torch.equal(drawn(pipe, count, prompts), wanted)


def test_forced_on_the_ordinary_pipeline_it_is_the_other_one_and_the_difference_is_told():
    pipe = made(Flux2KleinPipeline)
    plain = drawn(pipe, guidance_scale=1.0)
    with KleinKV(force=True)(pipe) as report:
        found = drawn(pipe, guidance_scale=1.0)
    torch.testing.assert_close(found, drawn(made(Flux2KleinKVPipeline)), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-5) and report.damage > 1e-4


def test_both_passes_of_guidance_share_the_references():
    pipe = made(Flux2KleinPipeline)
    words = {"negative_prompt_embeds": torch.zeros(1, 5, 32), "guidance_scale": 3.0}
    with KleinKV(force=True)(pipe) as report:
        drawn(pipe, **words)
    assert (report.reference_passes, report.cached_passes) == (1, 8)


@pytest.mark.parametrize("kind", [Flux2KleinKVPipeline])
def test_references_are_read_before_a_request(kind, tmp_path):
    pipe = made(kind)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (64, 64 + 32 * number, 3), dtype=np.uint8)) for number in (0, 1)]
    wanted = drawn(pipe)
    warm = KleinKV().prefill(pipe, images)
    words = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    with warm(pipe):
        found = pipe(
            None, prompt_embeds=words, height=64, width=64, num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_model_is_known_again_in_another_folder(tmp_path):
    pipe = made(Flux2KleinKVPipeline)
    prints = [fingerprint(pipe.transformer)]
    for name in ("one", "other"):
        pipe.transformer.save_pretrained(tmp_path / name)
        prints.append(fingerprint(Flux2Transformer2DModel.from_pretrained(tmp_path / name)))
    assert len(set(prints)) == 1


def test_what_changes_how_references_are_read_is_refused():
    pipe = made(Flux2KleinKVPipeline)
    with pytest.raises(UserError, match="attention_kwargs"), KleinKV()(pipe):
        drawn(pipe, attention_kwargs={"scale": 0.5})
