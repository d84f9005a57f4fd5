"""`lissom generate` as a user calls it: broken off, and with what it cannot use."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import gguf_files
import pytest
import torch
from gguf_files import Kind
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lissom import NativeDecode


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    return gguf_files.write(path, gguf_files.model_of("llama"), Kind.Q8_0, "llama")


def a_sentence(code: int, err: str, words: str) -> None:
    """Exit code 2, and on standard error these words in one line or so, and no traceback."""
    assert code == 2, err
    assert words in " ".join(err.split()) and "Traceback" not in err
    assert len(err.strip().splitlines()) <= 4, err


def test_a_gguf_file_runs(run, gguf_file):
    code, out, err = run("generate", gguf_file, "the", "--max-new-tokens", 5, "--no-native")
    again = run("generate", gguf_file, "the", "--max-new-tokens", 5)
    assert code == again[0] == 0, err + again[2]
    assert out.strip() and again[1].strip()


CUTS = {
    "header": (20, "begin as a GGUF"),
    "metadata": (2000, "metadata cannot be read"),
    "tensor": (-300_000, "ends at"),
}


@pytest.mark.parametrize("where", CUTS)
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_gguf_file_that_was_cut_off(run, gguf_file, tmp_path, where, dtype):
    """A dtype asks for dense weights, which transformers reads."""
    size, words = CUTS[where]
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf_file.read_bytes()[:size])
    code, _, err = run("generate", path, "the", *(["--dtype", dtype] if dtype else []))
    a_sentence(code, err, words if dtype is None else str(path.name))


def test_a_gguf_file_of_an_unsupported_type(run, tmp_path):
    path = gguf_files.write(tmp_path / "t.gguf", gguf_files.model_of("llama"), Kind.TQ1_0, "llama")
    code, _, err = run("generate", path, "the")
    a_sentence(code, err, "token_embd.weight is of type TQ1_0: supported are F32, F16")


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    """A folder whose model has one weight that is no number."""
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("options", [[], ["--no-native"], ["--no-native", "--temperature", 1]], ids=str)
def test_weights_that_are_no_numbers(run, damaged, options):
    code, _, err = run("generate", damaged, "Who?", "--max-new-tokens", 3, *options)
    a_sentence(code, err, "logits are NaN" if options else "NaN or infinite values: the model is damaged")


@pytest.mark.parametrize(
    "options,words",
    [
        ([], "model.layers.1.mlp.up_proj.weight has NaN"),
        (["--group-size", 48], "group_size=48: expected a multiple of 32"),
        (["--bits", 5], "bits=5: expected 4 or 8"),
        (["--head-bits", 3], "head_bits=3: expected 4, 8 or 16"),
    ],
)
def test_quantize_says_what_does_not_fit(run, damaged, options, words):
    code, _, err = run("quantize", damaged, "-o", damaged / "out", *options)
    a_sentence(code, err, words)
    assert not (damaged / "out").exists()


@pytest.mark.parametrize("text,words", [("", "has 0 tokens"), ("A few words.", "tokens, but 8192 are asked for")])
def test_calibration_texts_that_are_too_short(run, tiny_folder, tmp_path, text, words):
    (tmp_path / "text.txt").write_text(text)
    code, _, err = run("quantize", tiny_folder, "-o", tmp_path / "out", "--calibration", tmp_path / "text.txt")
    a_sentence(code, err, words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([" "], "The prompt is empty"),
        (["Who?", "--dtype", "int3"], "No valid recipe: dtype"),
        (["Who?", "--kv", "int2"], "kv='int2': expected one of bf16, int8, fp32"),
        (["Who?", "--kv", "int8", "--no-native"], "leave out --kv or --no-native"),
        (["Who?", "--top-p", 0], "top_p=0"),
        (["Who?", "--stop", ""], "A stop string is empty"),
        (["Who?", "--max-new-tokens", 5000], "the model reads at most 2048"),
    ],
)
def test_arguments_that_do_not_fit(run, tiny_folder, arguments, words):
    code, out, err = run("generate", tiny_folder, *arguments)
    a_sentence(code, err, words)
    assert not out.strip()


@pytest.mark.parametrize("method,wanted", [("native-decode: {kv: int8}", "int8"), ("kv-budget: {size: 1MB}", "bf16")])
@pytest.mark.parametrize("given", ["fp32", None])
def test_kv_is_what_is_given_or_the_recipes(run, tiny_folder, tmp_path, monkeypatch, method, wanted, given):
    used, enter = [], NativeDecode.__call__
    monkeypatch.setattr(NativeDecode, "__call__", lambda self, model: used.append(self) or enter(self, model))
    (tmp_path / "recipe.yaml").write_text(f"methods: [{method}]")
    options = ["--kv", given] if given else []
    code, _, err = run(
        "generate", tiny_folder, "Who?", "--recipe", tmp_path / "recipe.yaml", "--max-new-tokens", 2, *options
    )
    assert code == 0, err
    assert [native.kv for native in used] == [given or wanted]


@pytest.fixture
def endless(tiny_folder, tmp_path):
    """A model that goes on for as long as anybody likes."""
    for file in tiny_folder.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    facts = json.loads((tiny_folder / "config.json").read_text())
    config = LlamaConfig(**facts | {"max_position_embeddings": 1 << 20, "num_hidden_layers": 1})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("native", ["--native", "--no-native"])
def test_ctrl_c_in_the_middle_of_an_answer(endless, native):
    command = [sys.executable, "-m", "lissom", "generate", str(endless), "Who?", "--max-new-tokens", "1000000", native]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.read(20)  # in the middle of it
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and b"Interrupted" in err and b"Traceback" not in err
