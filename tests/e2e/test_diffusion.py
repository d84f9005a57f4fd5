"""`lissom edit` and `lissom refine` as a user calls them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image
from pipelines import small_emoji

from lissom.diffusion.demo.model import Shape, new_pipeline
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.evolve import pipelines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, emoji = tmp_path_factory.mktemp("pipelines"), small_emoji()
    for references in ("set", "joint"):
        shape = Shape(size=16, patch=4, width=32, head=8, double=1, single=1, references=references)
        new_pipeline(shape, emoji).save_pretrained(folder / references)
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(network, DDIMScheduler()).save_pretrained(folder / "plain")
    random = np.random.default_rng(0)
    for name, mode, shape in (
        ("one.png", "RGB", (16, 16, 3)), ("clear.png", "RGBA", (16, 24, 4)), ("grey.png", "L", (20, 16)),
    ):  # fmt: skip
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / name)
    (folder / "text.png").write_text("no picture")
    return folder


def same(one, other):
    return np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_references_are_read_once_and_kept_in_a_file(run, folder, tmp_path):
    shown = [word for name in ("one.png", "clear.png", "grey.png") for word in ("--image", folder / name)]
    asked = ("--prompt", "a thing 1", "--steps", 3, "--seed", 1)
    out, json_file = tmp_path / "out.png", tmp_path / "facts.json"
    code, text, err = run("edit", folder / "set", *shown, *asked, "-o", out, "--json", json_file)
    assert code == 0 and "what was read of the references takes" in text, err
    facts = json.loads(json_file.read_text())
    assert facts["reference_passes"] == 1 and facts["files"] == [str(out)]
    for options in (("--cache", "off"), ("--references", tmp_path / "kept")):
        code, _, err = run("edit", folder / "set", *shown, *asked, "-o", tmp_path / "again.png", *options)
        assert code == 0 and same(out, tmp_path / "again.png"), err
    code, _, err = run("edit", folder / "set", *asked, "-o", tmp_path / "again.png", "--references", tmp_path / "kept")
    assert code == 0 and same(out, tmp_path / "again.png"), err
    code, text, err = run("edit", folder / "joint", *shown, *asked, "-o", tmp_path / "joint.png", "--count", 2)
    assert code == 0 and "references were in every step" in text and (tmp_path / "joint-2.png").exists(), err
    code, text, err = run("edit", folder / "joint", *shown, *asked, "-o", tmp_path / "joint.png", "--cache", "force")
    assert code == 0 and "the first output without references in it is off by" in text, err


def test_a_coarse_picture_is_refined(run, folder, tmp_path):
    asked = ("refine", folder / "set", "--guide", folder / "one.png", "--steps", 3)
    code, _, err = run(*asked, "-o", tmp_path / "same.png", "--alpha", 0)
    assert code == 0, err
    guide, found = (np.asarray(Image.open(file)).astype(int) for file in (folder / "one.png", tmp_path / "same.png"))
    assert np.abs(guide - found).max() <= 1
    code, text, err = run(*asked, "-o", tmp_path / "large.png", "--size", 32, "--prompt", "a thing 1", "--json", "-")
    assert code == 0 and json.loads(text)["seconds"] > 0, err
    assert Image.open(tmp_path / "large.png").size == (32, 32)
    code, _, err = run(
        "refine",
        folder / "set",
        "--guide",
        folder / "clear.png",
        "--size",
        36,
        "--steps",
        1,
        "-o",
        tmp_path / "wide.png",
    )
    assert code == 0 and Image.open(tmp_path / "wide.png").size == (36, 24), err


def test_any_pipeline_is_refined_and_its_steps_are_searched(run, folder, tmp_path, monkeypatch):
    asked = ("refine", folder / "plain", "--guide", folder / "one.png", "-o", tmp_path / "fine.png")
    code, _, err = run(*asked, "--steps", 3, "--alpha", 0)
    assert code == 0, err
    guide, found = (np.asarray(Image.open(file)).astype(int) for file in (folder / "one.png", tmp_path / "fine.png"))
    assert np.abs(guide - found).max() <= 1
    code, _, err = run(*asked, "--size", 32)
    assert code == 2 and "draws pictures of 16 by 16 pixels alone" in err
    code, _, err = run("optimize", folder / "plain", "-o", tmp_path / "none")
    assert code == 2 and "takes no reference pictures" in err

    noise = torch.randint(256, (5, 30, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(pipelines, "load_emoji", lambda size: replace(small_emoji(), pictures=noise))
    monkeypatch.setattr(pipelines, "own_steps", lambda pipeline: 10)
    report = tmp_path / "report"
    code, text, err = run(
        "optimize", folder / "plain", "--refine", "--quick", "--max-quality-loss", "99%", "-o", report
    )
    assert code == 0 and "h-transform" in text and "lissom refine" in text, err
    rows = {row["name"]: row for row in json.loads((report / "results.json").read_text())["rows"]}
    assert rows["10 steps + h-transform/quality loss"]["value"] == 0 and len(rows) == 6
    code, _, err = run(*asked, "--recipe", report / "recipe.yaml")
    assert code == 0, err


def test_an_interrupted_search_keeps_what_it_has(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "load_emoji", lambda size: small_emoji())
    drawn, calls = pipelines._drawn, []

    def pressed(*given):
        calls.append(given)
        if len(calls) == 4:  # what is compared with, two recipes, and then
            raise KeyboardInterrupt
        return drawn(*given)

    monkeypatch.setattr(pipelines, "_drawn", pressed)
    code, text, err = run("optimize", folder / "set", "--quick", "-o", tmp_path / "report")
    assert code == 2 and "Stopped early" in err and "Not tried yet" in text
    assert (tmp_path / "report" / "index.html").is_file()
    assert len((tmp_path / "report" / "measurements.jsonl").read_text().split("\n")) == 3


def test_recipes_and_the_search_for_one(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "load_emoji", lambda size: small_emoji())
    report = tmp_path / "report"
    for _ in range(2):
        code, text, err = run("optimize", folder / "set", "--quick", "--max-quality-loss", "99%", "-o", report)
        assert code == 0 and "Best within a loss of 99.0%" in text, err
        assert len((report / "measurements.jsonl").read_text().split()) > 9
        monkeypatch.setattr(pipelines, "_drawn", lambda *given: pytest.fail("drawn again"))
    assert "klein-kv" in (report / "index.html").read_text()
    results = json.loads((report / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert rows["20 steps/quality loss"]["value"] == 0 and abs(rows["20 steps + klein-kv/quality loss"]["value"]) < 1e-4
    assert len(rows) == 18
    asked = ("--image", folder / "one.png", "-o", tmp_path / "out.png")
    code, _, err = run("edit", folder / "set", "--recipe", report / "recipe.yaml", *asked)
    assert code == 0, err
    (tmp_path / "int8.yaml").write_text("steps: 2\nmethods: [klein-kv: {storage: int8}]")
    told = ("edit", folder / "set", "--recipe", tmp_path / "int8.yaml", "-o", tmp_path / "out.png")
    kept = ("--references", tmp_path / "kept.safetensors")
    for words in ((), ("--image", folder / "one.png", *kept), kept):  # nothing to read; read; read before
        code, _, err = run(*told, *words)
        assert code == 0, err
    (tmp_path / "refine.yaml").write_text("steps: 2\nmethods: [h-transform: {alpha: 0}]")
    code, _, err = run("refine", folder / "set", "--guide", folder / "one.png", "--recipe", tmp_path / "refine.yaml",
                       "-o", tmp_path / "fine.png")  # fmt: skip
    assert code == 0, err
    guide, found = (np.asarray(Image.open(file)).astype(int) for file in (folder / "one.png", tmp_path / "fine.png"))
    assert np.abs(guide - found).max() <= 1
    (tmp_path / "other.yaml").write_text("methods: [eviction]")
    for words, sentence in (
        (("edit", folder / "set", "--recipe", tmp_path / "other.yaml", *asked), "acts on language models"),
        (("edit", folder / "set", "--recipe", tmp_path / "refine.yaml", "--steps", 3, *asked), "leave out the options"),
        (("generate", "smollm2-135m", "--recipe", tmp_path / "refine.yaml", "a"), "recipe of a diffusion model"),
        (("optimize", folder / "set", "--device", "other.json", "-o", report), "--device is of language models"),
    ):  # fmt: skip
        code, _, err = run(*words)
        assert code == 2 and sentence in err


@pytest.mark.parametrize(
    "words,sentence",
    [
        (("edit", "set", "--image", "none.png"), "There is no picture"),
        (("edit", "set", "--image", "text.png"), "cannot be read as a picture"),
        (("edit", "set", *("--image", "one.png") * 9), "9 references: expected 1 to 8"),
        (("edit", "set", "--image", "one.png", "--size", "18"), "no multiple of 4"),
        (("edit", "set", "--image", "one.png", "--steps", "0"), "expected at least 1"),
        (
            ("edit", "set", "--image", "one.png", "--cache", "maybe"),
            "expected one of auto, on, off, force",
        ),
        (("edit", "set", "--image", "one.png", "--storage", "int3"), "storage='int3'"),
        (("edit", "set", "--references", "none"), "is not there, and there is no --image"),
        (("edit", "set", "--references", "one.png"), "no readable file of references"),
        (("edit", "joint", "--image", "one.png", "--cache", "on"), "see noise and text"),
        (("edit", "joint", "--image", "one.png", "--cache", "approximate"), "which can be approximated"),
        (("edit", "nothing"), "There is no folder nothing"),
        (("edit", "no/thing"), "cannot be loaded as a pipeline"),
        (("edit", "."), "has no model_index.json"),
        (("refine", "set", "--guide", "clear.png", "--mask", "one.png"), "does not fit a guide of"),
        (("refine", "set", "--guide", "one.png", "--alpha", "-1"), "alpha=-1"),
        (("edit", "set", "--image", "one.png", "--storage", "int8", "--cache", "off"), "none are here: leave it out"),
        (("edit", "set", "--size", "0"), "A height of 0 pixels"),
        (("optimize", "set", "--no-peers"), "--no-peers is of language models"),
        (("optimize", "none", "--refine"), "--refine is of diffusion models"),
        (("refine", "set", "--guide", "grey.png", "--level", "ve"), "level='ve'"),
        (("train-dit", "--lora", "2"), "--make-cacheable"),
        (("train-dit", "--make-cacheable", "joint", "--width", "32"), "leave out width"),
        (("train-dit", "--make-cacheable", "set"), "cacheable already"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    code, _, err = run(*words, "-o", tmp_path / "out.png")
    said = [line for line in err.splitlines() if line.startswith("lissom: ")]
    assert code == 2 and len(said) == 1 and sentence in said[0] and "Traceback" not in err
    assert not (tmp_path / "out.png").is_file()


def test_the_pipeline_is_one_of_diffusers(folder):
    from diffusers import DiffusionPipeline

    assert isinstance(DiffusionPipeline.from_pretrained(folder / "set"), PixelEditPipeline)
