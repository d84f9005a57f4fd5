"""Quantised models of every architecture: what they compute, what they keep, what they refuse."""

from __future__ import annotations

import weakref

import pytest
import torch
from tiny import ALL_ARCHITECTURES, ByteTokenizer, random_ids, tiny_model

from lissom import Quantize
from lissom.errors import UserError
from lissom.kernels.packed import unpack
from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear
from lissom.models.linear import linear_layers, weight_of
from lissom.weights.quant.apply import formats, stored_bytes
from lissom.weights.quant.plan import mean_nll

TINY = {"calibration_tokens": 4096}


def converted(architecture="llama", model=None, **settings):
    model = model or tiny_model(architecture)
    return Quantize(**TINY, **settings).convert(model, ByteTokenizer())


def distance(model, wanted, ids):
    with torch.no_grad():
        return float((model(ids).logits - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_every_matrix_is_packed_and_means_nearly_the_same(architecture):
    model, ids = tiny_model(architecture), random_ids(40)
    own = {n: weight_of(m).clone() for layer in linear_layers(model) for n, m in layer.items()}
    biases = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    before, full = model(ids).logits.detach(), stored_bytes(model)
    converted(model=model, bits=8, method="rtn")
    assert {n for n, f in formats(model).items() if f == "q8"} >= own.keys()
    for name, weight in own.items():
        error = (unpack(model.get_submodule(name).packed) - weight).abs().amax()
        assert error < weight.abs().amax() / 250
    assert all(torch.equal(parameter, biases[n]) for n, parameter in model.named_parameters() if n in biases)
    assert distance(model, before, ids) < 0.2 and stored_bytes(model) < 0.5 * full
    assert isinstance(model.get_output_embeddings(), PackedLinear) and not model.training
    assert model.generate(ids[:, :8], max_new_tokens=4).shape[1] == 12


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
@pytest.mark.parametrize("method", ["search", "gptq"])
def test_calibrated_methods_are_nearer_than_rounding(architecture, method):
    """On the text that they were calibrated on, as they must; whether elsewhere is for a real model to tell."""
    from lissom.models.calibration import calibration_windows

    ids = calibration_windows(ByteTokenizer(), None, 4096, 512)
    wanted = tiny_model(architecture)(ids).logits.detach()
    errors = [distance(converted(architecture, bits=4, method=m, head_bits=16), wanted, ids) for m in ("rtn", method)]
    assert errors[1] < 0.98 * errors[0]


def test_weights_are_freed_one_by_one():
    model = tiny_model("llama")
    first = weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    alive = []

    def progress(stage, done, total):
        if stage == "layers":
            alive.append(first() is not None)

    Quantize(method="search", **TINY).convert(model, ByteTokenizer(), progress)
    assert alive[0] and not any(alive[1:])


@pytest.mark.parametrize("architecture,tied", [("gemma3", True), ("gpt2", True), ("qwen2", True), ("llama", False)])
def test_tied_ends_stay_one(architecture, tied):
    model = converted(architecture, method="rtn")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding) and (embedding.quants.data_ptr() == head.quants.data_ptr()) == tied
    model.tie_weights()  # transformers' own call must do no harm
    assert head.packed.format == "q8"


@pytest.mark.parametrize("head_bits,format", [(4, "q4_min"), (8, "q8"), (16, None)])
def test_head_bits(head_bits, format):
    model = converted("gemma3", method="rtn", head_bits=head_bits)
    assert getattr(model.lm_head, "format", None) == format
    if format is None:
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gemma_s_embedding_is_scaled():
    model = tiny_model("gemma3")
    wanted = model.model.embed_tokens(torch.arange(1, 9))
    converted(model=model, method="rtn")
    torch.testing.assert_close(model.model.embed_tokens(torch.arange(1, 9)), wanted, atol=0.1, rtol=0)


def test_mixed_bits_keep_the_budget():
    sizes = []
    for target in (5.0, 6.0, 7.0, 8.5):
        model = converted(method="rtn", target_bits=target)
        layers = [m.packed for n, m in model.named_modules() if isinstance(m, PackedLinear) and "layers" in n]
        bits = 8 * sum(packed.nbytes for packed in layers) / sum(packed.rows * packed.columns for packed in layers)
        assert target - 0.3 < bits <= target
        sizes.append(sum(packed.format == "q8" for packed in layers))
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] == 21


def test_the_sensitive_matrix_gets_more_bits():
    """All weights lie on a 4-bit grid but those of one matrix."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in linear_layers(model):
            for name, module in layer.items():
                if name != "model.layers.1.mlp.down_proj":
                    module.weight.copy_((module.weight * 8).round().clamp(-7, 7) / 8)
                    module.weight[:, ::16], module.weight[:, 1::16] = 7 / 8, -1.0
    kinds = formats(converted(model=model, target_bits=5.3, method="rtn"))
    assert [n for n, kind in kinds.items() if "layers" in n and kind == "q8"] == ["model.layers.1.mlp.down_proj"]


def test_max_loss():
    from lissom.models.calibration import calibration_windows

    ids = calibration_windows(ByteTokenizer(), None, 4096, 512)[:4]
    own = mean_nll(tiny_model("gemma3"), ids)
    # On random weights a rounding may as well help: in this model 4 bits lose much more than 8.
    models = [converted(model=tiny_model("gemma3"), bits=bits, method="rtn", head_bits=16) for bits in (4, 8)]
    coarse, fine = (mean_nll(model, ids) - own for model in models)
    wanted = (coarse + fine) / 2
    assert coarse > 0.05 and wanted > 0
    mixed = converted(model=tiny_model("gemma3"), method="rtn", max_loss=wanted, head_bits=16)
    assert mean_nll(mixed, ids) - own <= wanted + 1e-5
    assert {"q8", "q4_min"} <= set(formats(mixed).values())
    before = tiny_model("phi3")  # in which 8 bits lose something
    with pytest.raises(UserError, match="8 bits everywhere"):
        converted(model=before, method="rtn", max_loss=1e-9)
    assert not formats(before) and all(p.requires_grad for p in before.parameters())


def test_gradients_reach_what_lies_below():
    """Adapters beside packed layers can be trained."""
    model = converted(method="rtn")
    inputs = torch.randn(1, 6, 64, requires_grad=True)
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad is not None and bool((inputs.grad != 0).any())


def test_a_model_in_bf16():
    model, ids = tiny_model("qwen2").bfloat16(), random_ids(30)
    before = model(ids).logits.float().detach()
    converted(model=model, bits=8, method="gptq")
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16 and distance(model, before, ids) < 0.15


@pytest.mark.parametrize(
    "settings,words",
    [
        ({"bits": 3}, "expected 4 or 8"),
        ({"group_size": 48}, "a multiple of 32"),
        ({"group_size": 0}, "a multiple of 32"),
        ({"group_size": 32.0}, "a multiple of 32"),
        ({"target_bits": float("nan")}, "take 5"),
        ({"method": "awq"}, "expected one of"),
        ({"head_bits": 2}, "expected 4, 8 or 16"),
        ({"target_bits": 4.2}, "take 5"),
        ({"target_bits": 6, "bits": 8}, "leave bits at 4"),
        ({"target_bits": 6, "max_loss": 0.1}, "not both"),
        ({"max_loss": -1}, "above 0"),
        ({"max_loss": float("nan")}, "above 0"),
        ({"damping": 0}, "between 0 and 1"),
        ({"shrinkage": 1.5}, "from 0 to 1"),
        ({"calibration_tokens": 5}, "at least 512"),
    ],
)
def test_settings_that_do_not_fit(settings, words):
    with pytest.raises(UserError, match=words):
        Quantize(**settings)


def test_models_that_cannot_be_quantised(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        converted(model=model)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UserError, match="has 9 tokens"):
        Quantize(calibration=str(tmp_path / "short.txt")).convert(tiny_model("llama"), ByteTokenizer())
    with pytest.raises(UserError, match="already"):
        converted(model=converted(method="rtn"))
    with pytest.raises(UserError, match="needs one"):
        Quantize().convert(tiny_model("llama"))


def test_fused_experts_are_refused():
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UserError, match="are in no linear layers"):
        Quantize(method="rtn").convert(AutoModelForCausalLM.from_config(config))
