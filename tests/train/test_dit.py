from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines import small_emoji

from lissom.diffusion.demo.model import Shape, new_pipeline
from lissom.diffusion.demo.pipeline import REFERENCES, PixelEditPipeline
from lissom.diffusion.klein_kv import KleinKV
from lissom.errors import UserError
from lissom.train.dit import DitConfig, make_cacheable, train_dit
from lissom.train.folder import last_checkpoint

SHAPE = Shape(size=16, patch=4, width=32, head=8, double=1, single=1)
CONFIG = DitConfig(
    steps=6, batch_size=4, warmup_steps=1, precision="fp32", eval_steps=3, save_steps=2, logging_steps=2, sample_steps=6
)


@pytest.fixture(scope="module")
def emoji():
    return small_emoji()


def weights(pipeline):
    return {**pipeline.transformer.state_dict(), **pipeline.text_encoder.state_dict()}


class Stopped(Exception):
    pass


def stop_at(step):
    def progress(done, total):
        if done == step:
            raise Stopped

    return progress


@pytest.mark.parametrize("references", REFERENCES)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(references, emoji, tmp_path):
    shape = replace(SHAPE, references=references)
    whole = new_pipeline(shape, emoji)
    history = train_dit(whole, CONFIG, emoji, tmp_path / "whole")
    with pytest.raises(Stopped):
        train_dit(new_pipeline(shape, emoji), CONFIG, emoji, tmp_path / "parts", stop_at(5))
    assert last_checkpoint(tmp_path / "parts").name == "checkpoint-4"
    again = new_pipeline(shape, emoji, seed=1)
    assert train_dit(again, CONFIG, emoji, tmp_path / "parts") == history
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6]
    assert {"held_out_0", "held_out_1", "held_out_2", "held_out_4"} <= history[-1].keys()
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 2
    picture = Image.open(tmp_path / "whole" / "samples" / "step-6.png")
    assert picture.size == (7 * 64, 6 * 64)


def test_ctrl_c_is_behind_a_step_and_the_run_goes_on_from_there(emoji, tmp_path):
    whole = new_pipeline(SHAPE, emoji)
    history = train_dit(whole, CONFIG, emoji, tmp_path / "whole")

    def interrupt(done, total):
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(UserError, match="Interrupted behind step 3, which is saved"):
        train_dit(new_pipeline(SHAPE, emoji), CONFIG, emoji, tmp_path / "parts", interrupt)
    again = new_pipeline(SHAPE, emoji)
    found = train_dit(again, CONFIG, emoji, tmp_path / "parts")
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    assert found[-1] == history[-1]


def test_what_is_trained_is_loaded_as_any_pipeline(emoji, tmp_path):
    pipeline = new_pipeline(SHAPE, emoji)
    train_dit(pipeline, CONFIG, emoji, tmp_path)
    train_dit(new_pipeline(SHAPE, emoji), CONFIG, emoji, tmp_path)  # as where it was killed behind its last step
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, PixelEditPipeline)
    assert loaded.config.references == "set" and loaded.config.size == 16
    red = Image.new("RGB", (16, 16), "red")
    drawn = [
        one([red], "a thing 3", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
        for one in (pipeline, loaded)
    ]
    assert all(torch.equal(value, weights(loaded)[name]) for name, value in weights(pipeline).items())
    torch.testing.assert_close(drawn[0].images, drawn[1].images)


def test_it_learns(emoji, tmp_path):
    config = replace(CONFIG, steps=60, learning_rate=3e-3, logging_steps=20, eval_steps=60, save_steps=60)
    history = train_dit(new_pipeline(SHAPE, emoji), config, emoji, tmp_path)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.85 * losses[0]


def test_a_damaged_checkpoint_and_a_loss_that_is_no_number(emoji, tmp_path):
    with pytest.raises(Stopped):
        train_dit(new_pipeline(SHAPE, emoji), CONFIG, emoji, tmp_path, stop_at(3))
    (tmp_path / "checkpoints" / "checkpoint-2" / "state.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="checkpoint-2 cannot be read"):
        train_dit(new_pipeline(SHAPE, emoji), CONFIG, emoji, tmp_path)
    with pytest.raises(UserError, match="learning rate may be too high"):
        train_dit(new_pipeline(SHAPE, emoji), replace(CONFIG, learning_rate=1e30), emoji, tmp_path / "high")
    assert last_checkpoint(tmp_path / "high") is None


@pytest.mark.parametrize(
    "changes", [{"steps": 0}, {"warmup_steps": 9}, {"ema_decay": 1.0}, {"learning_rate": float("nan")}, {"seed": -1}]
)
def test_settings_out_of_range(changes):
    with pytest.raises(UserError):
        replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "first",
    [
        "import lissom.diffusion.demo.pipeline",
        "import lissom.train.dit",
        "import lissom.diffusion.klein_kv",
        "import lissom, diffusers",
        "import diffusers, lissom",
        "from diffusers import DiffusionPipeline; import lissom",
        "import lissom; from diffusers import Flux2KleinKVPipeline",
    ],
)
def test_diffusers_knows_the_pipeline_whatever_is_imported_first(first):
    code = f"{first}; from diffusers import DiffusionPipeline; import diffusers; print(diffusers.PixelEditPipeline)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "lissom.diffusion.demo.pipeline" in done.stdout, done.stderr


@pytest.mark.parametrize("rank", [None, 2])
def test_a_model_is_made_cacheable_by_a_short_training(rank, emoji, tmp_path):
    before = new_pipeline(replace(SHAPE, references="joint"), emoji)
    before.save_pretrained(tmp_path / "joint")
    images = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    with pytest.raises(UserError, match="see noise"), KleinKV()(before):
        pass
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "joint")
    make_cacheable(pipe, "set", rank)
    train_dit(pipe, CONFIG, emoji, tmp_path / "set")
    made = DiffusionPipeline.from_pretrained(tmp_path / "set")
    assert made.config.references == "set" and not [name for name in weights(made) if "lora" in name]
    old, new = weights(before), weights(made)
    assert old.keys() == new.keys()
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert bool(same) == (rank is not None) and ("table.weight" in same) == (rank is not None)
    options = {"num_inference_steps": 3, "output_type": "np", "prompt": "a thing 1"}
    drawn = [pipe(images, generator=torch.Generator().manual_seed(0), **options).images for pipe in (pipe, made)]
    with KleinKV()(made) as report:
        drawn.append(made(images, generator=torch.Generator().manual_seed(0), **options).images)
    assert report.reference_passes == 1
    for other in drawn[1:]:
        assert abs(other - drawn[0]).max() < 1e-4


def test_what_cannot_be_made_cacheable_is_refused(emoji):
    with pytest.raises(UserError, match="cacheable already"):
        make_cacheable(new_pipeline(SHAPE, emoji), "set")
    for bad in ({"references": "joint"}, {"rank": 0}):
        with pytest.raises(UserError, match="expected"):
            make_cacheable(new_pipeline(replace(SHAPE, references="joint"), emoji), **bad)
