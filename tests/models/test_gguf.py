from __future__ import annotations

import struct

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import ARCHITECTURES, Kind
from transformers import AutoModelForCausalLM, GgufConfig

import lissom
from lissom.errors import UserError
from lissom.kernels.packed import unpack
from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear
from lissom.models import assets
from lissom.models.gguf import GgufFile, blocks, load_dense, load_packed

KINDS = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q4_K, Kind.Q6_K)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_mean_what_the_reference_says(kind):
    weight = np.random.default_rng(0).normal(size=(35, 512)).astype(np.float32)
    data = gguf_files.blocks_of(weight, kind).view(np.uint8).reshape(35, -1)
    packed = blocks.pack(torch.from_numpy(data), kind)
    expected = torch.from_numpy(gguf.dequantize(data, kind).reshape(35, 512))
    assert torch.equal(packed.unpack(), expected)
    torch.testing.assert_close(unpack(packed), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_1, Kind.Q6_K], ids=lambda kind: kind.name)
def test_a_file_is_the_model_that_transformers_makes_of_it(architecture, kind, tmp_path):
    model = gguf_files.model_of(architecture)
    path = gguf_files.write(tmp_path / "m.gguf", model, kind, architecture)
    packed, tokenizer = load_packed(path)
    if architecture == "smollm3":  # transformers does not read these: the weights as the reference rounds them
        reference = model
        rounded = {
            name: torch.from_numpy(gguf.dequantize(gguf_files.blocks_of(tensor.numpy(), kind), kind))
            for name, tensor in model.state_dict().items()
            if tensor.ndim == 2 and kind != Kind.Q6_K
        }
        reference.load_state_dict(rounded, strict=False)
        if kind == Kind.Q6_K:
            return
    else:
        given = {"config": model.config, "gguf_file": path.name, "dtype": torch.float32}
        config = GgufConfig(dequantize=True)
        reference = AutoModelForCausalLM.from_pretrained(tmp_path, **given, quantization_config=config).eval()
    weights = reference.state_dict()
    found = 0
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            torch.testing.assert_close(module.packed.unpack(), weights[f"{name}.weight"], rtol=1e-6, atol=1e-7)
            found += 1
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter.data, weights[name], msg=name)
        found += 1
    assert found == len(weights)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits, expected = packed(ids).logits, reference(ids).logits
    error = (logits - expected).norm() / expected.norm()
    assert error < 0.1  # activations of 8 bits
    for wrong in (-1, len(gguf_files.TOKENS)):
        with pytest.raises(UserError, match="outside the vocabulary"):
            packed(torch.tensor([[wrong]]))
    assert tokenizer("in the 12").input_ids == [gguf_files.TOKENS.index(t) for t in ("in", "Ġthe", "Ġ", "12")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_config_is_that_of_the_model(architecture, tmp_path):
    model = gguf_files.model_of(architecture)
    path = gguf_files.write(tmp_path / "m.gguf", model, Kind.F32, architecture)
    packed, _ = load_packed(path)
    given, found = model.config.to_dict(), packed.config.to_dict()
    differ = {key: (given[key], found.get(key)) for key in given if given[key] != found.get(key)}
    differ = {
        k: v for k, v in differ.items() if k not in ("architectures", "rms_norm_eps", "initializer_range", "dtype")
    }
    assert not differ
    assert packed.config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, model(ids).logits, rtol=1e-3, atol=2e-3)


def test_tied_weights_are_one_copy_and_dtype_is_of_the_activations(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.model_of("gemma3"), Kind.Q8_0, "gemma3")
    model, _ = lissom.load(path, torch.bfloat16, weights="packed")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.quants.data_ptr() == head.quants.data_ptr()
    assert embedding.embed_scale == 16.0
    output = model(torch.arange(5)[None], output_hidden_states=True)
    assert output.logits.dtype == torch.bfloat16 and {h.dtype for h in output.hidden_states} == {torch.bfloat16}
    assert embedding.scales.dtype == torch.float16 and not any(t.is_meta for t in model.buffers())


def test_llama3_frequencies(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    model = gguf_files.model_of("llama", rope_parameters=rope)
    from lissom.models.gguf.architecture import frequency_factors

    factors = frequency_factors(model.config, rope)
    assert factors[0] == 1 and factors[-1] == 8
    path = tmp_path / "m.gguf"
    write_with_factors(path, model, factors.numpy())
    packed, _ = load_packed(path)
    assert packed.config.rope_parameters == rope
    # Any others are taken as they are, at any length.
    odd = factors.numpy() * np.linspace(1, 2, 32, dtype=np.float32)
    write_with_factors(path, model, odd)
    packed, ids = load_packed(path)[0], torch.arange(40)[None]
    wanted = 500000.0 ** -(np.arange(0, 64, 2) / 64) / odd
    for length in (10, 40, 600):
        cosine, _ = packed.model.rotary_emb(torch.ones(1), torch.arange(length)[None])
        np.testing.assert_allclose(cosine[0, -1, :32].numpy(), np.cos((length - 1) * wanted), atol=2e-5)
    with torch.no_grad():
        plain = packed(ids).logits
        with lissom.NativeDecode(kv="fp32")(packed):
            torch.testing.assert_close(packed(ids).logits, plain, rtol=1e-3, atol=2e-3)
    write_with_factors(path, model, odd[:20])
    with pytest.raises(UserError, match="does not fit the heads"):
        load_packed(path)


def write_with_factors(path, model, factors):
    original = gguf.GGUFWriter.write_header_to_file

    def write(self, *given):
        self.add_tensor("rope_freqs.weight", factors)
        original(self, *given)

    gguf.GGUFWriter.write_header_to_file = write
    try:
        gguf_files.write(path, model, Kind.Q8_0, "llama")
    finally:
        gguf.GGUFWriter.write_header_to_file = original


@pytest.fixture
def sound(tmp_path):
    return gguf_files.write(tmp_path / "m.gguf", gguf_files.model_of("llama"), Kind.Q8_0, "llama")


def test_a_truncated_file(sound):
    whole = sound.read_bytes()
    for size, words in (
        (len(whole) // 2, "tensor .* ends at byte"),
        (3000, "metadata"),
        (100, "metadata"),
        (10, "begin"),
    ):
        sound.write_bytes(whole[:size])
        with pytest.raises(UserError, match=words):
            lissom.load(sound, weights="packed")


def test_bytes_changed_at_random_give_a_sentence_or_a_model(sound):
    whole, random = sound.read_bytes(), np.random.default_rng(0)
    end = whole.index(b"token_embd.weight")
    for _ in range(150):
        changed = bytearray(whole)
        for place in random.integers(0, end + 1500, 3):
            changed[place] = random.integers(0, 256)
        sound.write_bytes(changed)
        try:
            GgufFile(sound)
        except UserError as error:
            assert str(sound) in str(error)


@pytest.mark.parametrize("leave_out", ["blk.1.ffn_up.weight", "token_embd.weight", "blk.0.attn_norm.weight"])
def test_a_missing_tensor(leave_out, tmp_path):
    model = gguf_files.model_of("llama")
    path = gguf_files.write(tmp_path / "m.gguf", model, Kind.Q8_0, "llama", leave_out=leave_out)
    with pytest.raises(UserError, match=f"no tensor {leave_out}"):
        load_packed(path)


def test_hyperparameters_that_are_none(sound):
    whole = sound.read_bytes()
    for value, words in ((0, "does not fit"), (3, "does not fit|fit together|shape")):
        key = whole.index(b"llama.attention.head_count") + len("llama.attention.head_count") + 4
        sound.write_bytes(whole[:key] + struct.pack("<I", value) + whole[key + 4 :])
        with pytest.raises(UserError, match=words):
            load_packed(sound)


def test_scales_that_are_no_numbers(tmp_path):
    model = gguf_files.model_of("llama")
    path = gguf_files.write(tmp_path / "m.gguf", model, Kind.Q8_0, "llama")
    record = GgufFile(path).tensors["blk.1.attn_v.weight"].data
    place = path.read_bytes().index(record[0].tobytes())
    content = bytearray(path.read_bytes())
    content[place : place + 2] = struct.pack("<e", float("inf"))
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"blk\.1\.attn_v\.weight has scales that are NaN or infinite"):
        load_packed(path)
    norm = np.full(256, np.nan, np.float32)
    gguf_files.write(path, model, Kind.Q8_0, "llama", blk__0__ffn_norm__weight=norm)
    with pytest.raises(UserError, match=r"blk\.0\.ffn_norm\.weight: .*NaN"):
        load_packed(path)


def test_types_without_a_packed_format_load_dense(tmp_path):
    model = gguf_files.model_of("llama")
    path = gguf_files.write(tmp_path / "m.gguf", model, Kind.Q5_1, "llama")
    with pytest.raises(UserError, match=r"is of type Q5_1: supported are F32"):
        load_packed(path)
    dense, _ = lissom.load(path)
    for name, weight in model.model.layers[1].mlp.named_parameters():
        wanted = gguf.dequantize(gguf.quantize(weight.detach().numpy(), Kind.Q5_1), Kind.Q5_1)
        assert np.array_equal(dense.model.layers[1].mlp.get_parameter(name).detach().numpy(), wanted)


def test_what_is_not_supported(tmp_path, sound):
    model = gguf_files.model_of("llama")
    path = gguf_files.write(tmp_path / "k.gguf", model, Kind.TQ1_0, "llama")
    with pytest.raises(UserError, match=r"token_embd\.weight is of type TQ1_0: supported are F32"):
        load_packed(path)
    sound.write_bytes(sound.read_bytes().replace(b"llama", b"gemma", 1))
    with pytest.raises(UserError, match="architecture 'gemma': supported are llama, qwen2"):
        load_packed(sound)
    path = gguf_files.write(
        tmp_path / "s.gguf", model, Kind.Q8_0, "llama", output__weight=np.zeros((9, 256), np.float32)
    )
    with pytest.raises(UserError, match=r"output\.weight has the shape \[9, 256\], expected \[263, 256\]"):
        load_packed(path)
    with pytest.raises(UserError, match="expected 'dense' or 'packed'"):
        lissom.load(sound, weights="light")


def test_the_embedded_model(smollm2):
    packed, tokenizer = lissom.load(weights="packed")
    dense, other = smollm2
    text = "Dates: 2024-11-05, naïve 漢字 🎉\n\tdef f(x): return x**2  # 1st"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert torch.equal(ids, other(text, return_tensors="pt").input_ids)
    assert tokenizer.chat_template == other.chat_template and tokenizer.eos_token_id == other.eos_token_id
    assert torch.equal(
        packed.model.layers[3].self_attn.q_proj.packed.unpack(), dense.model.layers[3].self_attn.q_proj.weight
    )
    with torch.no_grad():
        error = (packed(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    assert error < 0.1
    assert (assets.cache_dir() / "smollm2-135m-gguf" / assets.GGUF_NAME).is_file()


def test_methods_that_begin_from_scratch_know_a_file_when_they_see_one(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", gguf_files.model_of("llama"), Kind.F32, "llama")
    model, _ = load_dense(path)
    with pytest.raises(UserError, match="loaded from a checkpoint"):
        lissom.NobleConfig(rank=4).convert(model)
