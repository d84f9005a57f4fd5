from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UNet2DModel,
)
from pipelines import editing, pictures

from lissom.diffusion.klein_kv import KleinKV, ReferenceStore, WarmReferences, hooks
from lissom.errors import UserError


def steps_of(pipe, images, prompt="a thing", **options):
    """The latents behind every step."""
    seen = []

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    options = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)} | options
    pipe(images, prompt, callback_on_step_end=keep, output_type="latent", **options)
    return torch.stack(seen)


@pytest.mark.parametrize("references", ["set", "each"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("prompts", [["a thing"], ["a thing", "red"]])
def test_every_step_is_that_of_the_model_without_a_cache(references, count, guidance_scale, prompts):
    pipe = editing(references)
    images = pictures(count)
    wanted = steps_of(pipe, images, prompts, guidance_scale=guidance_scale)
    with KleinKV()(pipe) as report:
        found = steps_of(pipe, images, prompts, guidance_scale=guidance_scale)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert report.reference_passes == (count if references == "each" else 1)  # both prompts and both passes share it
    reads_in_a_step = references == "set" and len(prompts) == 1
    assert report.cached_passes == 3 * (2 if guidance_scale > 1 else 1) - reads_in_a_step and report.damage is None
    assert torch.equal(steps_of(pipe, images, prompts, guidance_scale=guidance_scale), wanted)


def test_references_matter():
    pipe = editing()
    one, other = (steps_of(pipe, pictures(2, seed)) for seed in (0, 1))
    assert (one - other).abs().max() > 1e-3


def test_references_are_read_before_the_first_step_and_never_again(monkeypatch):
    pipe, images, prompts = editing(), pictures(2), ["a thing", "red"]
    wanted = steps_of(pipe, images, prompts)
    read, poisoned = hooks.read, []

    def once(*arguments, **options):
        assert not poisoned
        poisoned.append(True)
        return read(*arguments, **options)

    monkeypatch.setattr(hooks, "read", once)
    with KleinKV()(pipe) as report:
        torch.testing.assert_close(steps_of(pipe, images, prompts), wanted, atol=2e-5, rtol=2e-5)
        assert poisoned and report.cached_passes == 3
        other = steps_of(pipe, images, "red", num_inference_steps=5, generator=torch.Generator().manual_seed(1))
    assert report.reference_passes == 1  # another prompt, other noise, other steps: no pass over references
    wanted = steps_of(pipe, images, "red", num_inference_steps=5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(other, wanted, atol=2e-5, rtol=2e-5)


def test_a_single_picture_reads_its_references_in_its_first_step():
    pipe, images = editing(), pictures(2)
    wanted = steps_of(pipe, images)
    with KleinKV()(pipe) as report:
        for passes in (2, 5):  # and of the second request all three
            torch.testing.assert_close(steps_of(pipe, images), wanted, atol=2e-5, rtol=2e-5)
            assert (report.reference_passes, report.cached_passes) == (1, passes)
    bytes_of = {layer.untyped_storage().nbytes() for entry in report.store.entries() for layer in (
        packed.values for packed in (*entry.keys, *entry.values))}  # fmt: skip
    assert bytes_of == {entry.nbytes // 8 for entry in report.store.entries()}  # of four blocks, and nothing beside


def test_poisoned_references_show_only_where_they_are_read():
    pipe, images = editing(), pictures(2)
    known = pipe.encode_images(images)[0][0]
    wanted = steps_of(pipe, images)
    poisoned = []  # while there is something in it, tokens of references are not a number to the model

    def poison(module, given, output):
        if poisoned:
            output[(given[0][:, :, None] == known).all(-1).any(-1)] = torch.nan
        return output

    def behind_the_first_step(pipe, step, timestep, tensors):
        poisoned.append(True)
        return {}

    options = {"num_inference_steps": 3, "output_type": "latent", "callback_on_step_end": behind_the_first_step}
    pipe.transformer.x_embedder.register_forward_hook(poison)
    for block, is_whole in ((nullcontext(), False), (KleinKV()(pipe), True)):
        poisoned.clear()
        with block:
            found = pipe(images, "a thing", generator=torch.Generator().manual_seed(0), **options).images
        assert bool(found.isfinite().all()) == is_whole
    torch.testing.assert_close(found, wanted[-1], atol=2e-5, rtol=2e-5)
    with KleinKV()(pipe):  # poisoned from the first step on
        assert not steps_of(pipe, images)[-1].isfinite().all()
    poisoned.clear()
    warm = KleinKV().prefill(pipe, images)
    poisoned.append(True)
    with warm(pipe):
        torch.testing.assert_close(steps_of(pipe, None), wanted, atol=2e-5, rtol=2e-5)


def test_a_store_serves_later_requests_and_other_models_have_their_own_entries():
    pipe, store = editing(), ReferenceStore(2**20)
    for _ in range(2):
        with KleinKV(store=store)(pipe) as report:
            steps_of(pipe, pictures(1))
    assert report.reference_passes == 0 and (store.hits, store.misses, len(store)) == (1, 1, 1)
    for changed, images in ((editing(seed=1), pictures(1)), (pipe, pictures(1, seed=1)), (pipe, pictures(2))):
        with KleinKV(store=store)(changed) as report:
            steps_of(changed, images)
        assert report.reference_passes == 1
    assert len(store) == 4


def test_references_that_see_only_themselves_are_combined_from_single_ones():
    pipe, store, images = editing("each"), ReferenceStore(2**20), pictures(2)
    with KleinKV(store=store)(pipe) as report:
        steps_of(pipe, images[:1])
        steps_of(pipe, images)
    assert report.reference_passes == 2  # the first one is not read again


@pytest.mark.parametrize("storage,share", [("model", 1.0), ("int8", 0.33), ("fp8", 0.33)])
def test_bytes_and_loss_of_storage(storage, share):
    pipe, images = editing(), pictures(2)
    wanted = steps_of(pipe, images)
    with KleinKV(storage=storage)(pipe) as report:
        found = steps_of(pipe, images)
    tokens = (16 * 16 + 24 * 16) // 16
    assert report.store.nbytes <= share * 2 * 4 * tokens * 64 * 4
    error = (found - wanted).norm() / wanted.norm()
    assert error < {"model": 1e-5, "int8": 2e-3, "fp8": 1e-2}[storage]


def test_a_model_that_was_not_trained_for_it_is_refused_unless_forced():
    pipe, images = editing("joint"), pictures(1)
    with pytest.raises(UserError, match="see noise and text"), KleinKV()(pipe):
        pass
    wanted = steps_of(pipe, images)
    with KleinKV(force=True)(pipe) as report:
        found = steps_of(pipe, images)
    assert report.damage > 1e-4 and not torch.allclose(found, wanted, atol=1e-5)


def test_without_references_nothing_changes():
    pipe = editing()
    wanted = steps_of(pipe, None)
    with KleinKV()(pipe) as report:
        assert torch.equal(steps_of(pipe, None), wanted)
    assert report.reference_passes == report.cached_passes == 0


def test_leaving_restores_the_editing():
    pipe = editing()
    processors, forward = pipe.transformer.attn_processors, pipe.transformer.forward
    with pytest.raises(RuntimeError, match="within"), KleinKV()(pipe):
        raise RuntimeError("within")
    assert pipe.transformer.attn_processors == processors and pipe.transformer.forward == forward
    with KleinKV()(pipe), pytest.raises(UserError, match="on in this pipeline already"), KleinKV()(pipe):
        pass


def test_other_pipelines_and_settings_are_refused():
    unet = UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    with pytest.raises(UserError, match="has no FLUX"), KleinKV()(DDPMPipeline(unet, DDPMScheduler())):
        pass
    with pytest.raises(UserError, match="storage='int3'"):
        KleinKV(storage="int3")
    pipe = editing()
    with pytest.raises(UserError, match="leave out limit"):
        KleinKV(limit="1MB", store=ReferenceStore(1000))
    assert KleinKV(limit=1000).prefill(pipe, pictures(1)).nbytes > 1000  # which keeps nothing for later
    with pytest.raises(UserError, match="give it more"), KleinKV(limit=1000)(pipe):
        steps_of(pipe, pictures(1))
    with pytest.raises(UserError, match="9 references: expected 1 to 8"):
        pipe(pictures(9), "a")


@pytest.mark.parametrize("references", ["set", "each"])
@pytest.mark.parametrize("storage", ["model", "int8", "fp8"])
def test_warm_references_serve_every_request_from_its_first_step_on(references, storage, tmp_path):
    pipe, images = editing(references), pictures(3)
    warm = KleinKV(storage=storage).prefill(pipe, images)
    assert warm.tokens == (16 * 16 + 24 * 8 + 8 * 12) // 16
    warm.save(tmp_path / "references.safetensors")
    again = WarmReferences.load(tmp_path / "references.safetensors")
    assert again.nbytes == warm.nbytes
    tolerance = 2e-5 if storage == "model" else 2e-2
    for prompt, options in (("a thing", {}), (["red", "blue"], {"guidance_scale": 3.0, "height": 24})):
        wanted = steps_of(pipe, images, prompt, **options)
        for handle in (warm, again):
            with handle(pipe):
                found = steps_of(pipe, None, prompt, **options)
            torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    assert torch.equal(steps_of(pipe, images), steps_of(pipe, images))


def test_warm_references_that_see_only_themselves_are_joined_in_any_order():
    pipe, images = editing("each"), pictures(3)
    first, second, third = (KleinKV().prefill(pipe, [image]) for image in images)
    with (third + first + second)(pipe):
        found = steps_of(pipe, None)
    wanted = steps_of(pipe, [images[2], images[0], images[1]])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    store = ReferenceStore(2**20)
    with KleinKV(store=store)(pipe) as report:
        steps_of(pipe, images)
        torch.testing.assert_close(
            steps_of(pipe, images[::-1]), steps_of(editing("each"), images[::-1]), atol=2e-5, rtol=2e-5
        )
    assert report.reference_passes == 3  # in other places they are turned, not read again


def test_warm_references_of_other_models_and_damaged_files_are_refused(tmp_path):
    pipe, file = editing(), tmp_path / "references.safetensors"
    warm = KleinKV().prefill(pipe, pictures(1))
    with pytest.raises(UserError, match="by another model"), warm(editing(seed=1)):
        pass
    with pytest.raises(UserError, match="give it no pictures"), warm(pipe):
        steps_of(pipe, pictures(1))
    with pytest.raises(UserError, match="see each other"):
        warm + warm
    with pytest.raises(UserError, match="see noise and text"):
        KleinKV().prefill(editing("joint"), pictures(1))
    with pytest.raises(UserError, match="0 references"):
        KleinKV().prefill(pipe, [])
    with pytest.raises(UserError, match="no reference to read"):
        KleinKV().prefill(pipe, None)
    with pytest.raises(UserError, match=r"read in torch\.float32: read them anew"), warm(pipe):
        pipe.to(torch.bfloat16)
        steps_of(pipe, None)
    pipe.to(torch.float32)
    warm.save(file)
    whole = file.read_bytes()
    for damaged, words in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is damaged"),
        (whole[:100], "no readable file of references"),
        (b"", "no readable file of references"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=words):
            WarmReferences.load(file)
    with pytest.raises(UserError, match="no file of references"):
        WarmReferences.load(tmp_path / "none")


def taylor_seer(pipe):
    return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2)


def attention_broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 900),
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: int(pipe.scheduler.timesteps[pipe.scheduler.step_index or 0]),
    )  # fmt: skip


def mag_cache(pipe):
    return MagCacheConfig(threshold=1.0, max_skip_steps=1, retention_ratio=0.2, num_inference_steps=8,
                          mag_ratios=[1.0] * 8)  # fmt: skip


def test_a_step_cache_that_cannot_is_told():
    pipe = editing()
    warm = KleinKV().prefill(pipe, pictures(1))
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(UserError, match="first-block cache fails on FLUX"), warm(pipe):
        steps_of(pipe, None)


@pytest.mark.parametrize("make", [taylor_seer, attention_broadcast, mag_cache])
def test_step_caches_work_on_warm_references(make):
    pipe, images = editing(), pictures(2)
    cache = make(pipe)
    pipe.transformer.enable_cache(cache)
    wanted = steps_of(pipe, images, num_inference_steps=8)  # references in every step, which have one length, too
    with pytest.raises(UserError, match="before enable_cache"), KleinKV()(pipe):
        steps_of(pipe, images)
    pipe.transformer.disable_cache()
    warm = KleinKV().prefill(pipe, images)
    exact = steps_of(pipe, images, num_inference_steps=8)
    pipe.transformer.enable_cache(cache)
    with warm(pipe):
        found = steps_of(pipe, None, num_inference_steps=8)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(found, exact, atol=2e-5, rtol=2e-5)  # steps were left out


def test_one_graph_serves_every_step_on_warm_references():
    pipe, images = editing(), pictures(2)
    wanted = steps_of(pipe, images)
    warm = KleinKV().prefill(pipe, images)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    with warm(pipe):
        torch.testing.assert_close(steps_of(pipe, None), wanted, atol=2e-5, rtol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one of each kind of block
    torch.compiler.reset()
