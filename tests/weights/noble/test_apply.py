from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from tiny import ALL_ARCHITECTURES, tiny_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from lissom import NobleConfig
from lissom.errors import UserError
from lissom.models.registry import build
from lissom.recipes import Recipe
from lissom.weights.noble import noble_parameter_groups, prune
from lissom.weights.noble.activation import KINDS
from lissom.weights.noble.apply import layers_of
from lissom.weights.noble.layer import kind_of

IDS = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(0))
NOBLE = NobleConfig(rank=4)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def loud(model):
    """Branches that are heard."""
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.noble.up.normal_(generator=torch.Generator().manual_seed(1))
    return model


def bert(**_):
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=128
    )
    return BertModel(config).eval(), {"input_ids": IDS}


def vit(**_):
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ViTForImageClassification(config).eval(), {"pixel_values": pixels}


def t5():
    config = T5Config(d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2, vocab_size=128, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval(), {"input_ids": IDS, "decoder_input_ids": IDS}


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("preset", ["paper", "repo"])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_saved_models_give_the_same_logits(architecture, preset, centred, tmp_path):
    model = loud(NobleConfig(rank=4, preset=preset, centred=centred).convert(tiny_model(architecture)))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert layers_of(again).keys() == layers_of(model).keys() != set()
    assert torch.equal(logits(again), logits(model))
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["method"] == "noble" and saved["settings"]["preset"] == preset


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_is_saved(kind, tmp_path):
    model = loud(NobleConfig(rank=4, activation=kind).convert(tiny_model("llama")))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("make", [bert, vit, t5])
def test_encoders_and_vision_models(make, tmp_path):
    model, inputs = make()
    blocks = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    loud(NOBLE.convert(model))
    plain = [name for name in blocks if name not in layers_of(model)]
    assert all("encoder" not in name and "block" not in name for name in plain), plain
    with torch.no_grad():
        wanted = model(**inputs)[0]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], wanted)


def test_the_same_model_without_its_head_has_the_same_branches(tmp_path):
    model = loud(NobleConfig(rank=4, target_modules=("model.layers.0.self_attn.q_proj",)).convert(tiny_model("llama")))
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert list(layers_of(bare)) == ["layers.0.self_attn.q_proj"]
    with torch.no_grad():
        assert torch.equal(bare(IDS)[0], model.model(IDS)[0])


@pytest.mark.parametrize("preset", ["paper", "repo"])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_parameters_are_counted_by_the_formula(architecture, preset):
    model = tiny_model(architecture)
    before = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    count = sum(parameter.numel() for parameter in model.parameters())
    NobleConfig(rank=5, preset=preset).convert(model)
    added = 0
    for layer in layers_of(model).values():
        out_features, in_features = layer.matrix().shape
        wanted = 5 * (in_features + out_features) + 5**2 + 4 * 5 + (2 * 5 if preset == "repo" else 0)
        assert sum(parameter.numel() for parameter in layer.noble.parameters()) == wanted
        added += wanted
    inside = [name for name in before if ".layers." in name or ".h." in name]
    assert sorted(inside) == sorted(layers_of(model))
    assert sum(parameter.numel() for parameter in model.parameters()) == count + added


@pytest.mark.parametrize("again", ["nothing", "init_weights", "post_init"])
@pytest.mark.parametrize("preset", ["paper", "repo"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_begins_as_the_sources_say(architecture, preset, again):
    model = NobleConfig(rank=16, preset=preset).convert(tiny_model(architecture))
    if again != "nothing":
        getattr(model, again)()
    drawn: dict[str, list[torch.Tensor]] = {}
    for layer in layers_of(model).values():
        columns = layer.matrix().shape[1]
        drawn.setdefault("main", []).append(layer.matrix().flatten() * math.sqrt(columns))
        for name, parameter in layer.noble.named_parameters():
            scale = math.sqrt(columns) if name == "down" else 4.0 if name in ("up", "mix_0", "mix_bias_0") else 1.0
            drawn.setdefault(name, []).append(parameter.flatten() * scale)
    found = {name: torch.cat(values).detach() for name, values in drawn.items()}
    deviation = {name: float(values.std()) for name, values in found.items()}
    assert deviation["main"] == pytest.approx(0.5, rel=0.02)
    assert deviation["down"] == pytest.approx(1.0, rel=0.03)
    assert deviation["up"] == pytest.approx(0.01, rel=0.03)
    for stage in "01":
        omega = found[f"omega_{stage}"]
        assert float(omega.min()) >= 0.8 and float(omega.max()) <= 1.2
        assert float(omega.mean()) == pytest.approx(1, abs=0.02) and deviation[f"omega_{stage}"] > 0.1
        phases = found[f"phi_{stage}"]
        assert float(phases.min()) >= 0 and float(phases.max()) < 2 * math.pi
        near = (phases + math.pi).remainder(2 * math.pi) - math.pi
        assert float(near.std()) == pytest.approx(0.1, rel=0.15)
    if preset == "paper":
        assert deviation["mix_0"] == pytest.approx(1.0, rel=0.05)
        assert float(found["mix_0"].abs().max()) <= math.sqrt(3) and "down_bias" not in found
    else:
        assert deviation["mix_0"] == pytest.approx(0.5, rel=0.05)
        assert float(found["mix_0"].abs().max()) > 0.5 * math.sqrt(3)  # normal
        assert not found["down_bias"].any()
        assert float(found["mix_bias_0"].abs().max()) <= 1 and deviation["mix_bias_0"] == pytest.approx(0.58, rel=0.15)
    if architecture == "gpt2":
        assert all(not layer.bias.any() for layer in layers_of(model).values())


def test_what_is_drawn_depends_on_the_seed_and_the_name_alone():
    one, other = NOBLE.convert(tiny_model("llama")), NobleConfig(4, target_modules=("up_proj",))
    torch.manual_seed(7)
    few = other.convert(tiny_model("llama"))
    for name, layer in layers_of(few).items():
        for own, parameter in layer.noble.named_parameters():
            assert torch.equal(parameter, getattr(layers_of(one)[name].noble, own))
    third = NobleConfig(4, seed=1).convert(tiny_model("llama"))
    name = next(iter(layers_of(third)))
    assert not torch.equal(layers_of(third)[name].noble.down, layers_of(one)[name].noble.down)


@pytest.mark.parametrize("rows", [11, 90])
@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_branches_without_output_leave_the_model_as_it_is(architecture, rows):
    ids = torch.randint(3, 120, (1, rows), generator=torch.Generator().manual_seed(0))
    model = tiny_model(architecture)
    with torch.no_grad():
        wanted = model(ids).logits
        NobleConfig(rank=4, mode="add-on", up_scale=0.0).convert(model)
        assert torch.equal(model(ids).logits, wanted)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_add_on_begins_near_the_model_that_it_is_added_to(architecture):
    model = tiny_model(architecture)
    wanted = logits(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    NobleConfig(rank=4, mode="add-on").convert(model)
    assert 0 < float((logits(model) - wanted).norm() / wanted.norm()) < 0.05
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in weights.items())  # under their own names


def test_dense_checkpoints_load(tmp_path):
    dense = tiny_model("llama")
    model = NobleConfig(rank=4).convert(tiny_model("llama"))
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and all(".noble." in name for name in missing)
    dense.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="add-on"):
        NOBLE.convert(loaded)
    assert not layers_of(loaded)
    NobleConfig(rank=4, mode="add-on").convert(loaded)


def test_a_dense_checkpoint_with_noble_in_its_config_gets_new_branches(tmp_path):
    settings = NobleConfig(rank=4, mode="add-on")
    wanted = logits(settings.convert(tiny_model("llama")))
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "lissom_training", "method": "noble", "version": 1,
        "settings": {"rank": 4, "mode": "add-on"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_loaded_as_asked_for_and_frequencies_are_not(dtype, tmp_path):
    model = loud(NOBLE.convert(tiny_model("llama")))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    for name, layer in layers_of(loaded).items():
        assert layer.weight.dtype == layer.noble.down.dtype == layer.noble.mix_0.dtype == dtype
        for own in ("omega_0", "phi_0", "omega_1", "phi_1"):
            kept = getattr(layer.noble, own)
            assert kept.dtype == torch.float32 and torch.equal(kept, getattr(layers_of(model)[name].noble, own))
    assert loaded(IDS).logits.dtype == dtype


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "qwen2"])
def test_gradients_reach_everything_from_the_first_step(architecture):
    model = NOBLE.convert(tiny_model(architecture))
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if "wpe" not in name and "wte" not in name and "embed" not in name:
            assert parameter.grad is not None and bool(parameter.grad.any()), name


@pytest.mark.parametrize("preset,two_sided", [("paper", False), ("repo", False), ("repo", True)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_groups_hold_every_parameter_once_with_its_rate(architecture, preset, two_sided):
    model = NobleConfig(rank=4, preset=preset, two_sided=two_sided).convert(tiny_model(architecture))
    groups = noble_parameter_groups(model, 1e-3, 0.1)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert groups[0]["lr"] == 1e-3 and len(groups) < 12
    gamma, exponent, omega, phi = (0.3, 0.45, 3, 5) if preset == "paper" else (0.2, 0.5, 2, 4)
    for name, layer in layers_of(model).items():
        rho = min(layer.matrix().shape) / 4
        assert rates[id(layer.weight)] == (1e-3, 0.1), name
        up, down = (rho**gamma, rho**gamma) if two_sided else (rho ** (2 * gamma), 1)
        wanted = {"up": up, "down": down, "mix": rho**exponent, "omega": omega, "phi": phi}
        for own, parameter in layer.noble.named_parameters():
            rate, decay = rates[id(parameter)]
            assert rate == pytest.approx(1e-3 * wanted.get(kind_of(own), 1.0)), own
            assert decay == (0.1 if kind_of(own) in ("up", "down", "mix") else 0.0), own
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            assert rates[id(parameter)][1] == 0


def test_taking_branches_out(tmp_path):
    model = loud(NOBLE.convert(tiny_model("llama")))
    names = [name for name in layers_of(model) if "mlp" in name]
    for name in names:
        model.get_submodule(name).noble.up.data.zero_()
    wanted = logits(model)
    prune(model, names)
    assert not set(names) & layers_of(model).keys() and torch.equal(logits(model), wanted)
    model.save_pretrained(tmp_path / "some")
    some = AutoModelForCausalLM.from_pretrained(tmp_path / "some")
    assert layers_of(some).keys() == layers_of(model).keys() and torch.equal(logits(some), wanted)
    prune(model, list(layers_of(model)))
    model.save_pretrained(tmp_path / "none")
    assert "quantization_config" not in json.loads((tmp_path / "none" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "none")
    assert torch.equal(logits(plain), logits(model))
    with pytest.raises(UserError, match="no branch"):
        prune(model, ["model.layers.0.mlp.up_proj"])


def test_patterns_choose_layers():
    def names(**changes):
        return set(layers_of(NobleConfig(rank=4, **changes).convert(tiny_model("llama"))))

    assert names(target_modules=("q_proj", "model.layers.0.mlp.*")) == {
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(3)),
        *(f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "up", "down")),
    }
    assert not any("mlp" in name for name in names(exclude_modules=("mlp.*",)))
    assert "lm_head" in names(target_modules=("lm_head",))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 64}, "no narrower"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"ratio": 1.5}, "ratio=1.5"),
        ({"rank": 4, "ratio": 0.1}, "expected one of them"),
        ({"activation": "relu"}, "activation"),
        ({"preset": "mine"}, "preset"),
        ({"up_scale": -1.0}, "up_scale"),
        ({"target_modules": ("qproj",)}, "no linear layer is called 'qproj'"),
        ({"exclude_modules": "*"}, "leaves no linear layer"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_sentences(changes, words):
    with pytest.raises(UserError, match=words):
        NobleConfig(**changes).convert(tiny_model("llama"))


def test_a_model_that_does_not_fit_is_left_as_it_was():
    model = tiny_model("llama")
    before = logits(model)
    with pytest.raises(UserError, match="k_proj"):
        NobleConfig(rank=40).convert(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(UserError, match=r"model.layers.1.mlp.up_proj has NaN"):
        NOBLE.convert(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 0
    assert not layers_of(model) and not hasattr(model.config, "quantization_config")
    NOBLE.convert(model)
    with pytest.raises(UserError, match="already"):
        NOBLE.convert(model)
    assert before.shape == logits(model).shape


def test_quantised_models_are_refused():
    import lissom

    with pytest.raises(UserError, match="quantised already"):
        NOBLE.convert(lissom.Quantize(method="rtn").convert(tiny_model("llama")))
    with pytest.raises(UserError, match="layers of noble"):
        lissom.Quantize(method="rtn").convert(NOBLE.convert(tiny_model("llama")))
    with pytest.raises(UserError, match="layers of noble"):
        lissom.SparseBitNetConfig().convert(NOBLE.convert(tiny_model("llama")))


def test_it_is_found_by_its_name_and_is_not_for_recipes():
    assert build("noble", {"rank": 8, "exclude_modules": ["k_proj"]}) == NobleConfig(8, exclude_modules=("k_proj",))
    with pytest.raises(UserError, match="lissom train --method noble"):
        Recipe.of(NobleConfig())


def test_peft_finds_the_main_weight():
    peft = pytest.importorskip("peft")
    model = loud(NOBLE.convert(tiny_model("llama")))
    wanted = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        assert torch.equal(adapted.eval()(IDS).logits, wanted)
    merged = adapted.merge_and_unload()
    assert len(layers_of(merged)) == 21 and torch.equal(logits(merged), wanted)


def test_generation_with_a_cache_gives_what_the_whole_text_gives():
    model = loud(NOBLE.convert(tiny_model("llama")))
    new = model.generate(IDS, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        assert torch.equal(model(new[:, :-1]).logits[:, 10:].argmax(-1), new[:, 11:])


def test_nothing_is_said_of_layers_that_are_all_there(caplog):
    with caplog.at_level(logging.WARNING):
        NOBLE.convert(tiny_model("llama"))
    assert not caplog.text


def test_a_new_model_of_a_known_config_is_begun_from_scratch(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    NOBLE.convert(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="loaded from a checkpoint"):
        NOBLE.convert(nn.Sequential(AutoModelForCausalLM.from_pretrained(tmp_path)))


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_another_model_of_the_same_config_stays_plain(architecture, tmp_path):
    plain = tiny_model(architecture)
    branched = type(plain)(plain.config)
    NobleConfig(rank=2).convert(branched)
    assert branched.config is branched.base_model.config and branched.config is not plain.config
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    NobleConfig(rank=2).convert(plain)


def test_drift_is_none_in_a_model_without_its_head(tmp_path):
    from lissom.weights.noble.diagnostics import omega_drift

    NOBLE.convert(tiny_model("llama")).save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert all(omega_drift(layer) == 0 for layer in layers_of(bare).values())


def test_a_whole_name_means_one_layer():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
    model["encoder"] = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
    NobleConfig(rank=2, target_modules=("layers.0",)).convert(model)
    assert list(layers_of(model)) == ["layers.0"]


def test_a_layer_with_two_names_stays_one():
    shared = nn.Linear(8, 8)
    model = NobleConfig(rank=2).convert(nn.ModuleList([shared, shared]))
    assert model[0] is model[1] and list(layers_of(model)) == ["0"]


def test_layers_whose_weights_other_code_reads_are_left_out():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(UserError, match="no linear layers that get a branch"):
        NobleConfig(rank=2, mode="add-on").convert(encoder)
    mamba = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=64, state_size=4))
    NobleConfig(rank=2).convert(mamba)
    mamba(torch.arange(9)[None]).logits.sum().backward()
    assert not any("dt_proj" in name for name in layers_of(mamba))
    for name, layer in layers_of(mamba).items():
        assert layer.noble.up.grad is not None and bool(layer.noble.up.grad.any()), name


def test_linear_layers_of_other_classes_are_named():
    model = FalconForCausalLM(FalconConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    for changes in ({}, {"target_modules": ("query_key_value",)}):
        with pytest.raises(UserError, match="FalconLinear"):
            NobleConfig(rank=2, **changes).convert(model)


def test_names_may_be_one_text():
    assert NobleConfig(rank=2, target_modules="q_proj").target_modules == ("q_proj",)
    built = build("noble", {"rank": 2, "target_modules": "q_proj, v_proj", "exclude_modules": ["x"]})
    assert built == NobleConfig(rank=2, target_modules=("q_proj", "v_proj"), exclude_modules=("x",))


def test_models_with_adapters_and_bare_layers_are_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=8))
    with pytest.raises(UserError, match="adapters"):
        NOBLE.convert(adapted)
    with pytest.raises(UserError, match="linear layer itself"):
        NOBLE.convert(nn.Linear(24, 24))
