from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import ARCHITECTURES, Kind
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

import lissom
from lissom.errors import UserError
from lissom.export.gguf import export_gguf
from lissom.export.gguf_tokenizer import tokenizer_metadata
from lissom.kernels.packed import pack_codes
from lissom.kernels.packed_layers import PackedLinear
from lissom.models import assets
from lissom.models.gguf import GgufFile, load_packed
from lissom.weights.sparse_bitnet import pack

OTHER_PYTHON = os.environ.get("LISSOM_LLAMA_CPP_PYTHON")
needs_llama_cpp = pytest.mark.skipif(
    not OTHER_PYTHON and importlib.util.find_spec("llama_cpp") is None,
    reason="needs llama-cpp-python, here or in the Python that LISSOM_LLAMA_CPP_PYTHON names",
)
PROBE = (
    "In the 12 days of 2024: naïve Straße, 漢字, 🎉🏳️‍🌈, ½ + x²\n\n\tdef f(x):  return x**2  # done\r\n   it's 1,000.50 "
)


def llama_cpp(path: Path, **asked) -> dict[str, np.ndarray]:
    output = path.with_suffix(".npz")
    script = Path(__file__).with_name("run_llama_cpp.py")
    command = [OTHER_PYTHON or sys.executable, script, path, output, json.dumps({"text": "a"} | asked)]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(output))


def tokenizer_of(merges=gguf_files.MERGES, tokens=gguf_files.TOKENS, pre=None, **options) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(tokens[:-1])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges], **options))
    backend.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[-1], pad_token=None)


def sentencepiece_like(prefix: bool) -> PreTrainedTokenizerFast:
    merges = ["▁ ▁", "t h", "i n", "▁ th", "th e", "▁th e", "▁ in", "▁ 1"]
    letters = sorted({letter for letter in "▁thein12:." + PROBE.replace(" ", "▁") if letter not in "漢字🎉\t\r"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += [merge.replace(" ", "") for merge in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges], unk_token="<unk>",
                byte_fallback=True, fuse_unk=True)  # fmt: skip
    backend = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    if not prefix:  # as Gemma; behind such a token llama.cpp begins with a prefix again
        tokenizer.add_tokens([AddedToken("▁▁", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q6_K],
                         ids=lambda kind: kind.name)  # fmt: skip
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_file_comes_out_as_it_went_in(kind, architecture, tmp_path):
    path = gguf_files.write(tmp_path / "in.gguf", gguf_files.model_of(architecture), kind, architecture)
    export_gguf(*load_packed(path), tmp_path / "out.gguf", type="q4_0")
    before, after = GgufFile(path), GgufFile(tmp_path / "out.gguf")
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert tensor.kind == after.tensors[name].kind and tensor.shape == after.tensors[name].shape
        if len(tensor.shape) == 2:
            assert np.array_equal(tensor.data, after.tensors[name].data), name
        else:
            assert np.allclose(tensor.data.view("<f4"), after.tensors[name].data.view("<f4"), atol=1e-6)
    differ = {key for key, value in before.metadata.items() if after.metadata.get(key, value) != value}
    assert not differ


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_models_come_back_as_they_were(architecture, tmp_path):
    model = gguf_files.model_of(architecture)
    assert list(export_gguf(model, tokenizer_of(), tmp_path / "m.gguf")) == ["F32"]
    again, tokenizer = load_packed(tmp_path / "m.gguf")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=2e-3)
    assert tokenizer(PROBE).input_ids == tokenizer_of()(PROBE).input_ids


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    LLAMA3 | {"original_max_position_embeddings": 8192},
    LLAMA3 | {"original_max_position_embeddings": 64},
]
SETTINGS = [
    *(("llama", {"rope_parameters": {"rope_theta": 777.0} | rope}) for rope in ROPES),
    ("llama", {"rms_norm_eps": 0.03}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"head_dim": 32}),
    ("phi3", {"sliding_window": 8}),
    *((architecture, {}) for architecture in ARCHITECTURES),
]


@pytest.mark.parametrize("weights", ["dense", "packed"])
@pytest.mark.parametrize("architecture,changes", SETTINGS, ids=str)
def test_every_setting_comes_back(architecture, changes, weights, tmp_path):
    model = gguf_files.model_of(architecture, **changes)
    export_gguf(model, tokenizer_of(), tmp_path / "m.gguf")
    again, tokenizer = lissom.load(tmp_path / "m.gguf", weights=weights)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=2e-3)
    assert tokenizer(PROBE).input_ids == tokenizer_of()(PROBE).input_ids
    if weights == "dense":
        assert all(
            again.state_dict()[name].equal(weight) for name, weight in model.state_dict().items() if weight.ndim == 2
        )
        again.save_pretrained(tmp_path / "folder")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "folder")(ids).logits.equal(again(ids).logits)


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_computes_the_same(architecture, tmp_path):
    changes = {}
    if architecture == "gemma3":
        changes = {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}
    if architecture == "llama":
        changes = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}  # fmt: skip
    if architecture == "qwen3":
        changes = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
    if architecture == "qwen2":
        changes = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
                                       "original_max_position_embeddings": 128}}  # fmt: skip
    model = gguf_files.model_of(architecture, **changes)
    tokenizer = tokenizer_of()
    export_gguf(model, tokenizer, tmp_path / "m.gguf")
    ids = torch.arange(100)[None]
    with torch.no_grad():
        expected = model(ids).logits[0]
    found = llama_cpp(tmp_path / "m.gguf", ids=ids[0].tolist(), text=PROBE)
    error = np.linalg.norm(found["logits"] - expected.numpy()) / expected.norm()
    assert error < 0.01
    assert found["tokens"].tolist() == tokenizer(PROBE).input_ids


@needs_llama_cpp
@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_llama_cpp_reads_every_type(type, tmp_path):
    model = gguf_files.model_of("qwen2")
    export_gguf(model, tokenizer_of(), tmp_path / "m.gguf", type)
    again, _ = load_packed(tmp_path / "m.gguf")
    ids = torch.arange(60)[None]
    with torch.no_grad():
        expected = again(ids).logits[0].numpy()
    found = llama_cpp(tmp_path / "m.gguf", ids=ids[0].tolist())
    assert np.linalg.norm(found["logits"] - expected) / np.linalg.norm(expected) < 0.05


@needs_llama_cpp
@pytest.mark.parametrize("prefix", [False, True])
def test_llama_cpp_reads_text_as_sentencepiece_does(prefix, tmp_path):
    tokenizer = sentencepiece_like(prefix)
    model = gguf_files.model_of("gemma3")
    model.resize_token_embeddings(len(tokenizer) + 5)  # rows beyond the tokenizer's
    export_gguf(model, tokenizer, tmp_path / "m.gguf", "bf16")
    found = llama_cpp(tmp_path / "m.gguf", text=PROBE)
    assert found["tokens"].tolist() == tokenizer(PROBE).input_ids


@needs_llama_cpp
def test_the_embedded_model_in_llama_cpp(tmp_path):
    original = assets.path("smollm2-135m-gguf") / assets.GGUF_NAME
    (tmp_path / "original.gguf").symlink_to(original)
    model, tokenizer = lissom.load(weights="packed")
    export_gguf(model, tokenizer, tmp_path / "ours.gguf")
    text = tokenizer.apply_chat_template([{"role": "user", "content": PROBE}], tokenize=False)
    theirs, ours = (llama_cpp(tmp_path / f"{name}.gguf", text=text, new=16) for name in ("original", "ours"))
    for name in theirs:
        assert np.array_equal(theirs[name], ours[name]), name
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == ours["tokens"].tolist()
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    assert np.linalg.norm(logits - ours["logits"]) / np.linalg.norm(logits) < 0.1
    assert (logits.argmax(-1) == ours["logits"].argmax(-1)).mean() > 0.85


def test_mistral_is_llama_as_far_as_its_window(tmp_path):
    facts = gguf_files.model_of("llama").config.to_dict()
    config = MistralConfig(**{key: value for key, value in facts.items() if key != "model_type"}, sliding_window=128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    export_gguf(model, tokenizer_of(), tmp_path / "m.gguf")
    again, _ = load_packed(tmp_path / "m.gguf")
    assert again.config.model_type == "llama" and again.config.max_position_embeddings == 128
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=2e-3)


def test_larger_groups_repeat_their_scale(tmp_path):
    model = gguf_files.model_of("qwen2")
    random = torch.Generator().manual_seed(0)
    for format, mins in (("q8", None), ("q4", None), ("q4_min", torch.randn(256, 4, generator=random))):
        codes = torch.randint(0, 256 if format == "q8" else 16, (256, 256), generator=random, dtype=torch.uint8)
        packed = pack_codes(codes, torch.randn(256, 4, generator=random), mins, format, group=64)
        model.model.layers[0].self_attn.o_proj = PackedLinear.of(packed)
        counts = export_gguf(model, tokenizer_of(), tmp_path / "m.gguf", "bf16")
        assert counts["BF16"] == 14 and len(counts) == 2
        again, _ = load_packed(tmp_path / "m.gguf")
        assert torch.equal(again.model.layers[0].self_attn.o_proj.packed.unpack(), packed.unpack())


def test_a_head_that_is_packed_by_itself_is_written(tmp_path):
    model = gguf_files.model_of("qwen2")
    rows = model.config.vocab_size
    model.set_output_embeddings(
        PackedLinear.of(pack_codes(torch.full((rows, 256), 130, dtype=torch.uint8), torch.ones(rows, 8), None, "q8"))
    )
    export_gguf(model, tokenizer_of(), tmp_path / "m.gguf", "f16")
    file = GgufFile(tmp_path / "m.gguf")
    assert (file.tensors["output.weight"].kind, file.tensors["token_embd.weight"].kind) == (Kind.Q8_0, Kind.F16)


def test_matrices_that_do_not_fill_blocks(tmp_path):
    model = gguf_files.model_of("qwen2", intermediate_size=80)
    counts = export_gguf(model, tokenizer_of(), tmp_path / "m.gguf", "q4_0")
    assert counts == {"Q4_0": 12, "F16": 2, "Q8_0": 1}


def test_how_text_is_split():
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    llama3 = words + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    qwen2 = llama3.replace("{1,3}", "")

    def split(pattern):
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), plain])

    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    for pre, options, name in (
        (None, {}, "gpt-2"), (digits, {}, "smollm"), (split(llama3), {"ignore_merges": True}, "llama-bpe"),
        (split(llama3), {}, "smaug-bpe"), (split(qwen2), {}, "qwen2"),
    ):  # fmt: skip
        assert tokenizer_metadata(tokenizer_of(pre=pre, **options), 300)["ggml.pre"] == name
    for pre in (split("a|b"), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        with pytest.raises(UserError, match="does not split text"):
            tokenizer_metadata(tokenizer_of(pre=pre), 300)


def test_what_cannot_be_written(tmp_path):
    from tiny import tiny_model

    tokenizer, path = tokenizer_of(), tmp_path / "m.gguf"
    with pytest.raises(UserError, match="type 'gpt2' cannot be written as GGUF: supported are llama, mistral"):
        export_gguf(tiny_model("gpt2"), tokenizer, path)
    model = gguf_files.model_of("llama")
    with pytest.raises(UserError, match="expected one of auto, f16"):
        export_gguf(model, tokenizer, path, "q3")
    with pytest.raises(UserError, match="The tokenizer has 263 tokens, the model 100"):
        tokenizer_metadata(tokenizer, 100)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="kind WordLevel"):
        export_gguf(model, words, path)
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UserError, match="'dynamic' cannot be said"):
        export_gguf(model, tokenizer, path)
    model = gguf_files.model_of("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj is a Bilinear"):
        export_gguf(model, tokenizer, path)
    model = gguf_files.model_of("gemma3", layer_types=["full_attention", "sliding_attention"] * 3)
    with pytest.raises(UserError, match="regular intervals"):
        export_gguf(model, tokenizer, path)
    model = gguf_files.model_of("qwen3")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj has weights beyond the range of F16"):
        export_gguf(model, tokenizer, path, "f16")
    assert list(tmp_path.iterdir()) == []


def test_the_command(lissom_cli, tmp_path):
    gguf_files.write(tmp_path / "in.gguf", gguf_files.model_of("llama"), Kind.Q4_0, "llama")
    done = lissom_cli("export", "gguf", tmp_path / "in.gguf", "-o", tmp_path / "out.gguf", "--json", "-")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["matrices"] == {"Q4_0": 16} and facts["bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.architecture").contents() == "llama"
    done = lissom_cli("export", "gguf", tmp_path / "in.gguf", "-o", tmp_path / "x.gguf", "--type", "q2")
    assert done.returncode == 2 and "expected one of auto, f16" in done.stderr


def ternary_model(pattern=(2, 4), hidden: int = 256):
    """Of shapes that llama.cpp's ternary blocks fit."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=len(gguf_files.TOKENS), max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return lissom.SparseBitNetConfig(*pattern).convert(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("type", ["auto", "tq2_0", "tq1_0"])
@pytest.mark.parametrize("pattern", [(2, 4), (6, 8)])
def test_ternary_matrices_lose_nothing_but_bits_of_their_scale(type, pattern, tmp_path):
    model = pack(ternary_model(pattern))
    kind = "TQ1_0" if type == "tq1_0" else "TQ2_0"
    assert export_gguf(model, tokenizer_of(), tmp_path / "m.gguf", type) == {kind: 14, "F32": 2}
    tensors = GgufFile(tmp_path / "m.gguf").tensors
    for stored, name in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        whole, scales = model.get_submodule(f"model.layers.1.{name}").packed.whole()
        found = tensors[f"blk.1.{stored}.weight"]
        got = gguf.dequantize(np.asarray(found.data).reshape(whole.shape[0], -1), Kind[kind])
        np.testing.assert_array_equal(got, whole.numpy() * scales.half().float().numpy()[:, None])


def test_ternary_rows_that_do_not_fill_blocks_are_refused_by_name(tmp_path):
    model = pack(ternary_model(hidden=192))
    with pytest.raises(
        UserError, match=r"model.layers.0.self_attn.q_proj has 192 inputs: TQ2_0 needs a multiple of 256"
    ):
        export_gguf(model, tokenizer_of(), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    assert export_gguf(model, tokenizer_of(), tmp_path / "m.gguf", "f16")["F16"] == 16


@needs_llama_cpp
def test_llama_cpp_computes_the_same_of_ternary_weights(tmp_path):
    model, ids = pack(ternary_model()), torch.randint(0, 200, (1, 24))
    export_gguf(model, tokenizer_of(), tmp_path / "m.gguf")
    found = llama_cpp(tmp_path / "m.gguf", ids=ids[0].tolist(), text=PROBE)
    with torch.no_grad():
        wanted = model(ids).logits[0].numpy()
    # llama.cpp rounds activations in blocks of 256, not by token.
    assert np.linalg.norm(found["logits"] - wanted) < 0.05 * np.linalg.norm(wanted)


@needs_llama_cpp
@pytest.mark.parametrize("type", ["tq2_0", "tq1_0"])
def test_llama_cpp_goes_on_as_a_trained_ternary_model_does(type, tmp_path):
    model = ternary_model()
    text = torch.randint(0, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):  # until it knows the text by heart
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(text).logits[0, :-1], text[0, 1:]).backward()
        optimiser.step()
    export_gguf(pack(model.eval()), tokenizer_of(), tmp_path / "m.gguf", type)
    found = llama_cpp(tmp_path / "m.gguf", ids=text[0, :8].tolist(), new=24)
    ours = model.generate(text[:, :8], max_new_tokens=24, do_sample=False)[0, 8:]
    assert found["greedy"].tolist() == ours.tolist() == text[0, 8:32].tolist()
