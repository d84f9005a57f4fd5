"""Whole models: converted, saved, packed, loaded, run natively."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ALL_ARCHITECTURES, DECODERS, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache

import lissom
from lissom.errors import UserError
from lissom.kernels import native
from lissom.kernels.packed_layers import PackedLinear
from lissom.kernels.ternary import TERNARY, TERNARY_2_4
from lissom.models.registry import build
from lissom.recipes import Recipe
from lissom.weights.sparse_bitnet import SparseBitNetConfig, census, pack
from lissom.weights.sparse_bitnet.apply import Census, check_packable, layers_of, set_sparse
from lissom.weights.sparse_bitnet.ternary import sparse_ternary

IDS = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("pattern", [(2, 4), (6, 8), (4, 4)])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_packed_and_saved_models_give_the_same_logits(architecture, pattern, tmp_path):
    model = SparseBitNetConfig(*pattern).convert(tiny_model(architecture))
    trained = logits(model)
    model.save_pretrained(tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert layers_of(again).keys() == layers_of(model).keys()
    assert torch.equal(logits(again), trained)
    pack(model)
    assert not layers_of(model) and torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), trained)


@pytest.mark.skipif(native.library() is None, reason="no native kernels")
@pytest.mark.parametrize("pattern", [(2, 4), (4, 4)])
@pytest.mark.parametrize("architecture", DECODERS)
def test_packed_models_run_natively(architecture, pattern, calls):
    model = pack(SparseBitNetConfig(*pattern).convert(tiny_model(architecture)))
    wanted = logits(model)
    with lissom.NativeDecode(kv="fp32")(model):
        prompt = logits(model)
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            steps = [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(IDS.shape[1])]
    assert calls == [IDS.shape[1], *[1] * IDS.shape[1]]
    # A sum that is rounded otherwise may move an activation by one of 127 steps, and that is all.
    for got in (prompt, torch.cat(steps, 1)):
        assert float((got - wanted).norm() / wanted.norm()) < 0.05


def test_gradients_reach_every_weight_after_loading(tmp_path):
    SparseBitNetConfig().convert(tiny_model("llama")).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_embeddings_and_heads_stay(tmp_path):
    model = tiny_model("qwen2")  # tied
    before = model.get_input_embeddings().weight
    SparseBitNetConfig().convert(model)
    assert model.get_input_embeddings().weight is before and model.get_output_embeddings().weight is before
    pack(model)
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert {m.format for m in model.modules() if isinstance(m, PackedLinear)} == {"ternary_2_4"}


def test_master_weights_of_16_bits_are_made_fp32_with_a_word(caplog, tmp_path):
    model = tiny_model("llama").bfloat16()
    with caplog.at_level(logging.WARNING):
        SparseBitNetConfig().convert(model)
    assert "fp32" in caplog.text
    assert all(layer.weight.dtype == torch.float32 for layer in layers_of(model).values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(layer.weight.dtype == torch.float32 for layer in layers_of(loaded).values())


def test_a_model_that_does_not_divide_is_left_as_it_was():
    model = tiny_model("llama", intermediate_size=100)
    with pytest.raises(UserError, match=r"multiple of 8 inputs; model.layers.0.mlp.down_proj has 100"):
        SparseBitNetConfig(6, 8).convert(model)
    assert not layers_of(model) and not hasattr(model.config, "quantization_config")


def test_damaged_weights_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj has NaN"):
        SparseBitNetConfig().convert(model)
    assert not layers_of(model)


def test_models_that_are_quantised_are_refused():
    model = lissom.Quantize(method="rtn").convert(tiny_model("llama"))
    with pytest.raises(UserError, match="quantised already"):
        SparseBitNetConfig().convert(model)
    model = SparseBitNetConfig().convert(tiny_model("llama"))
    with pytest.raises(UserError, match="already"):
        SparseBitNetConfig().convert(model)
    with pytest.raises(UserError, match="quantised already"):
        SparseBitNetConfig().convert(pack(model))


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="no sparse ternary layers"):
        pack(tiny_model("llama"))
    with pytest.raises(UserError, match="nothing to pack"):
        pack(SparseBitNetConfig(quantize=False).convert(tiny_model("llama")))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"n": 5, "m": 4}, "n of m"),
        ({"n": 2.5}, "n=2.5"),
        ({"sparse_share": 0.0}, "sparse_share"),
        ({"gradient": "some"}, "gradient"),
        ({"quantize": False, "mask_from": "ternary"}, "quantize=False"),
    ],
)
def test_bad_settings_are_sentences(changes, words):
    with pytest.raises(UserError, match=words):
        SparseBitNetConfig(**changes)


def test_a_foreign_or_damaged_config_is_refused(tmp_path):
    SparseBitNetConfig().convert(tiny_model("llama")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for settings, version, words in (({"k": 2}, 1, "damaged"), ({"n": 2}, 7, "version 7")):
        config["quantization_config"] |= {"settings": settings, "version": version}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=words):
            AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_census_counts_what_masks_take_away():
    model = SparseBitNetConfig().convert(tiny_model("llama"))
    set_sparse(model, False)
    before = census(model)
    set_sparse(model, True)
    after = census(model)
    assert before.zeros == pytest.approx(0.31, abs=0.01) and before.pruned == 0
    assert after.zeros == pytest.approx(before.zeros + after.pruned)
    assert after.pruned == pytest.approx(0.215, abs=0.01)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])  # plain, and with fused matrices
@pytest.mark.parametrize("scale_from", ["dense", "masked", "survivors"])
@pytest.mark.parametrize("pattern", [(2, 4), (6, 8), (15, 16)])
def test_the_census_is_that_of_the_weights_one_by_one(architecture, scale_from, pattern):
    model = SparseBitNetConfig(*pattern, scale_from=scale_from).convert(tiny_model(architecture))
    weights = zeros = pruned = empty = groups = 0
    for layer in layers_of(model).values():
        for part in layer.weight.detach().split(layer.parts):
            whole, mask, scale = sparse_ternary(part, *pattern, "master", scale_from)
            dense = torch.clamp(torch.round(part / scale), -1, 1)
            weights += part.numel()
            zeros += int((whole == 0).sum())
            pruned += int(((dense != 0) & ~mask).sum())
            inside = whole.reshape(len(part), -1, pattern[1]).count_nonzero(-1)
            groups, empty = groups + inside.numel(), empty + int((inside == 0).sum())
    assert census(model) == Census(zeros / weights, pruned / weights, empty / groups)


@pytest.mark.parametrize(
    "pattern,format",
    [((2, 4), TERNARY_2_4), ((1, 4), TERNARY_2_4), ((1, 2), TERNARY_2_4), ((2, 8), TERNARY_2_4), ((3, 8), TERNARY),
     ((3, 4), TERNARY)],
)  # fmt: skip
def test_patterns_that_leave_two_of_four_are_stored_as_such(pattern, format):
    model = pack(SparseBitNetConfig(*pattern).convert(tiny_model("llama")))
    assert {module.format for module in model.modules() if isinstance(module, PackedLinear)} == {format}


def test_it_is_found_by_its_name_and_is_not_for_recipes():
    assert build("sparse-bitnet", {"n": 6, "m": 8}) == SparseBitNetConfig(6, 8)
    with pytest.raises(UserError, match="lissom train --method sparse-bitnet"):
        Recipe.of(SparseBitNetConfig())


def test_dense_to_sparse_models_are_sparse_when_they_are_loaded_and_packed(tmp_path):
    """Only the trainer turns masks off."""
    model = SparseBitNetConfig(sparse_share=0.25).convert(tiny_model("llama"))
    trained = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), trained)
    assert {module.format for module in pack(again).modules() if isinstance(module, PackedLinear)} == {"ternary_2_4"}
    assert torch.equal(logits(again), trained)


def test_what_cannot_be_packed_is_known_before_it_is_trained():
    fused = SparseBitNetConfig().convert(tiny_model("phi3", head_dim=12, num_attention_heads=2, num_key_value_heads=1))
    control = SparseBitNetConfig(quantize=False).convert(tiny_model("llama"))
    packed = pack(SparseBitNetConfig().convert(tiny_model("llama")))
    refused = {"multiple of 16": fused, "floating point": control, "no sparse": tiny_model("llama"), "already": packed}
    for words, model in refused.items():
        with pytest.raises(UserError, match=words):
            check_packable(model)
        with pytest.raises(UserError, match=words):
            pack(model)


def damaged(change, folder) -> None:
    """A packed checkpoint whose tensors `change` has changed."""
    pack(SparseBitNetConfig().convert(tiny_model("llama"))).save_pretrained(folder)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("bad", [-2, 10**6])
def test_spills_outside_their_matrix_are_refused(tmp_path, bad):
    def change(tensors) -> None:
        name = next(name for name, tensor in tensors.items() if name.endswith("spills") and tensor.numel())
        tensors[name][-1] = bad

    damaged(change, tmp_path)
    with pytest.raises(UserError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scales_that_are_not_finite_are_refused(tmp_path, bad):
    def change(tensors) -> None:
        next(tensor for name, tensor in tensors.items() if name.endswith("scales"))[1] = bad

    damaged(change, tmp_path)
    with pytest.raises(UserError, match="scales has NaN or infinite"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
