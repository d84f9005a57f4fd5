"""Packed checkpoints in transformers' hands: written, read, memory-mapped, damaged, and without lissom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf_files
import pytest
import torch
from gguf_files import Kind
from safetensors.torch import load_file, save_file
from tiny import ALL_ARCHITECTURES, random_ids, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

import lissom
from lissom import Quantize
from lissom.errors import UserError
from lissom.weights.quant.apply import formats


def saved(folder, architecture="llama", **settings):
    model = Quantize(**{"method": "rtn", **settings}).convert(tiny_model(architecture))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4, "group_size": 64}, {"symmetric": True, "head_bits": 16}])
def test_round_trip(architecture, settings, tmp_path):
    model, ids = saved(tmp_path / "a", architecture, **settings), random_ids(30)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert model.state_dict().keys() == again.state_dict().keys()
    again.save_pretrained(tmp_path / "b")
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in "ab"]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][n], files[1][n]) for n in files[0])
    ends = again.get_input_embeddings(), again.get_output_embeddings()
    tied = model.config.tie_word_embeddings
    pointers = {(getattr(end, "quants", None) if hasattr(end, "quants") else end.weight).data_ptr() for end in ends}
    assert len(pointers) == (1 if tied else 2)


def test_it_is_mapped_and_lies_at_cache_lines(tmp_path):
    for architecture in ("llama", "qwen2", "gemma3"):
        saved(tmp_path / architecture, architecture)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / architecture)
        file = str(tmp_path / architecture / "model.safetensors")
        spans = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(file)
        ]
        for name, tensor in model.state_dict().items():
            if tensor.dtype == torch.uint8:
                assert tensor.data_ptr() % 64 == 0, name
                assert any(low <= tensor.data_ptr() < high for low, high in spans), name


BLOCKS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q5_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture,dtype", [("llama", torch.float32), ("qwen2", torch.bfloat16)])
def test_blocks_of_a_gguf_file(kind, architecture, dtype, tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.model_of(architecture), kind, architecture)
    model, ids = lissom.load(path, dtype, weights="packed")[0], torch.arange(30)[None]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype and torch.equal(model(ids).logits, again(ids).logits)
    tensors = again.state_dict()
    assert tensors.keys() == model.state_dict().keys()
    assert not any(tensor.data_ptr() % 64 for tensor in tensors.values() if tensor.dtype == torch.uint8)


def test_blocks_of_many_types_beside_a_layer_that_was_unpacked(tmp_path):
    kinds = {
        "down_proj": Kind.Q6_K,
        "v_proj": Kind.Q6_K,
        "o_proj": Kind.Q4_1,
        "gate_proj": Kind.F16,
        "q_proj": Kind.Q8_0,
    }
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.model_of("gemma3"), Kind.Q4_K, "gemma3", kinds=kinds)
    model, ids = lissom.load(path, weights="packed")[0], torch.arange(30)[None]
    layer = model.model.layers[1].mlp
    dense = torch.nn.Linear(layer.up_proj.columns, layer.up_proj.rows, bias=False)
    dense.weight.data = layer.up_proj.packed.unpack()
    layer.up_proj = dense
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert type(again.model.layers[1].mlp.up_proj) is torch.nn.Linear
    assert formats(again) == formats(model) and set(formats(again).values()) == {"q4_k", "q6_k", "q4_min", "f16", "q8"}
    assert again.lm_head.quants.data_ptr() == again.model.embed_tokens.quants.data_ptr()


def test_a_head_outlives_the_embedding_whose_tensors_it_had(tmp_path):
    model, ids = saved(tmp_path / "a", "qwen2"), random_ids(20)
    embedding = torch.nn.Embedding.from_pretrained(model.model.embed_tokens.packed.unpack())
    model.model.embed_tokens = embedding
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.lm_head.format == "q8" and torch.equal(model(ids).logits, again(ids).logits)


def test_the_embedded_model_as_packed(tmp_path):
    model, tokenizer = lissom.load(weights="packed")
    ids = tokenizer("The capital of France", return_tensors="pt").input_ids
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_model_without_its_head(tmp_path):
    model, ids = saved(tmp_path / "a"), random_ids(20)
    body, report = AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not report["missing_keys"] and report["unexpected_keys"] == {"lm_head.quants", "lm_head.scales"}
    torch.testing.assert_close(body(ids).last_hidden_state, model.model(ids).last_hidden_state)
    body.save_pretrained(tmp_path / "b")
    again = AutoModel.from_pretrained(tmp_path / "b")
    assert torch.equal(body(ids).last_hidden_state, again(ids).last_hidden_state)


def test_in_another_dtype(tmp_path):
    saved(tmp_path, "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.model.layers[0].self_attn.q_proj.scales.dtype == torch.float16
    assert model(random_ids(8)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "first,second", [("lissom", "transformers"), ("transformers", "lissom"), ("lissom.plugin", "transformers")]
)
def test_a_process_that_only_imports_lissom(tmp_path, first, second):
    saved(tmp_path)
    code = f"import {first}, {second}\n" + (
        "from transformers import AutoModelForCausalLM\n"
        f"print(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).lm_head.format)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "q8", done.stderr


def test_import_lissom_is_light():
    code = "import sys, lissom; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_without_lissom_does_not_run_with_random_weights(tmp_path):
    saved(tmp_path)
    code = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "Unknown quantization type, got lissom" in done.stderr


def test_a_plain_model_is_not_quantised_on_loading(tmp_path):
    from lissom.plugin import PackedConfig

    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=PackedConfig())


def edited(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda c: c.update(version=9), "version 9"),
        (lambda c: c["matrices"].update(lm_head="q8"), "damaged"),
        (lambda c: c["matrices"].update(lm_head=["q7", 32]), "no weight format 'q7'"),
        (lambda c: c["matrices"].update(lm_head=["q8", 33]), "multiple of 32"),
        (lambda c: c["matrices"].update({"model.norm": ["q8", 32]}), "no matrix that can be packed"),
        (lambda c: c["matrices"].update({"model.layers.7.mlp": ["q8", 32]}), "there is no model.layers.7.mlp"),
        (lambda c: c.update(shared={"lm_head": "nothing"}), "shared"),
    ],
)
def test_a_damaged_config(tmp_path, change, words):
    saved(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(UserError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_damaged_files(tmp_path, smollm2):
    saved(tmp_path)
    smollm2[1].save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    for missing in ("lm_head.scales", "model.layers.1.mlp.up_proj.weight"):
        save_file({n: t for n, t in whole.items() if n != missing}, weights, {"format": "pt"})
        with pytest.raises(UserError, match="missing"):
            lissom.load(tmp_path)
    save_file(whole | {"lm_head.scales": torch.zeros(3)}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        lissom.load(tmp_path)
    save_file(whole, weights, {"format": "pt"})
    assert lissom.load(tmp_path)[0].lm_head.format == "q8"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be loaded"):
        lissom.load(tmp_path)
