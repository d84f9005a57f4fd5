from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from lissom.errors import UserError
from lissom.files import atomic_path
from lissom.models import assets, describe_decoder, fingerprint
from lissom.models.load import load


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_describe_decoder(architecture):
    info = describe_decoder(tiny_model(architecture))
    assert (info.num_attention_heads, info.head_dim, info.max_position_embeddings) == (4, 16, 512)
    assert info.num_key_value_heads == {"llama": 2, "qwen3": 2, "gemma3": 1, "gpt2": 4}[architecture]
    assert sum(info.sliding) == (2 if architecture == "gemma3" else 0)


def test_fingerprint_tells_models_apart_and_not_dtypes():
    model = tiny_model("llama")
    own = fingerprint(model)
    assert own == fingerprint(tiny_model("llama")) == fingerprint(tiny_model("llama").bfloat16())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint(model) != own


def test_fingerprint_tells_other_rotations_apart():
    model = tiny_model("llama")
    own = fingerprint(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    assert fingerprint(model) != own


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"), atomic_path(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name,words", [("smollm2", "Did you mean"), ("./nowhere", "no model"), ("xyz", "Known names")])
def test_unknown_models(name, words):
    with pytest.raises(UserError, match=words):
        load(name)


def test_damaged_files(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + b"\x03\0\0\0" + b"\0" * 10)
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path / "b.gguf")
    with pytest.raises(UserError, match=r"without config\.json"):
        load(tmp_path)


def test_damaged_safetensors(tmp_path, smollm2):
    folder = tmp_path / "model"
    shutil.copytree(assets.path("smollm2-135m"), folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)


def test_a_damaged_cache_entry_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    made = []

    def make(asset, folder, say):
        made.append(asset.name)
        (folder / "weights").write_text("whole")

    monkeypatch.setattr(assets, "_make", make)
    folder = assets.path("smollm2-135m")
    assert assets.path("smollm2-135m") == folder and len(made) == 1
    (folder / "weights").write_text("half")
    assert not assets.is_whole(folder)
    assert (assets.path("smollm2-135m") / "weights").read_text() == "whole" and len(made) == 2
    made = (folder / "weights").stat().st_mtime_ns
    (folder / "weights").write_text("other")
    os.utime(folder / "weights", ns=(made, made))  # same size, same time: only the thorough check sees it
    assert assets.is_whole(folder) and not assets.is_whole(folder, thorough=True)
    assert json.loads((folder / assets.MANIFEST).read_text())["weights"]["bytes"] == 5


def test_atomic_path_leaves_the_old_content_on_failure(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gemma3"])
def test_a_folder_without_a_tokenizer(architecture, tmp_path):
    """Of some architectures transformers makes a tokenizer from nothing, which knows no text."""
    tiny_model(architecture).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="No tokenizer was found in") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
