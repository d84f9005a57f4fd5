"""Diffusion transformers: branches, and checkpoints that diffusers itself writes and reads."""

from __future__ import annotations

import json

import pytest
import torch

from lissom import NobleConfig
from lissom.errors import UserError
from lissom.training_plugin import method_in_training
from lissom.weights.noble import noble_parameter_groups, prune
from lissom.weights.noble.apply import layers_of

diffusers = pytest.importorskip("diffusers")


def dit():
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.eval(), {
        "hidden_states": image,
        "timestep": torch.tensor([3, 5]),
        "class_labels": torch.tensor([1, 2]),
    }


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 9, 4, generator=random), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=random), "img_ids": torch.zeros(9, 3),
        "pooled_projections": torch.randn(1, 32, generator=random), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return model.eval(), inputs


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("make", [dit, flux])
def test_saved_models_give_the_same_output(make, tmp_path):
    model, inputs = make()
    before = output(model, inputs)
    NobleConfig(rank=4).convert(model)
    assert layers_of(model) and not any("norm" in name or "embed" in name for name in layers_of(model))
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.noble.up.normal_()
    wanted = output(model, inputs)
    assert not torch.allclose(before, wanted)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["method"] == "noble"
    again = type(model).from_pretrained(tmp_path)
    assert layers_of(again).keys() == layers_of(model).keys() and torch.equal(output(again, inputs), wanted)
    assert method_in_training(again) == NobleConfig(rank=4)
    narrow = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = next(iter(layers_of(narrow).values()))
    assert layer.noble.omega_0.dtype == torch.float32 and layer.noble.mix_0.dtype == torch.bfloat16


def test_branches_can_be_added_and_taken_out_again(tmp_path):
    model, inputs = dit()
    model.save_pretrained(tmp_path / "plain")
    loaded = type(model).from_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="add-on"):
        NobleConfig(rank=4).convert(loaded)
    NobleConfig(rank=4, mode="add-on", up_scale=0.0).convert(loaded)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    prune(loaded, list(layers_of(loaded)))
    loaded.save_pretrained(tmp_path / "again")
    assert not json.loads((tmp_path / "again" / "config.json").read_text()).get("quantization_config")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "again"), inputs), output(model, inputs))


def test_gradients_reach_every_branch():
    model, inputs = dit()
    NobleConfig(rank=4).convert(model)
    model(**inputs).sample.square().mean().backward()
    for layer in layers_of(model).values():
        assert all(bool(parameter.grad.any()) for parameter in layer.noble.parameters())
    groups = noble_parameter_groups(model, 1e-3)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_plain_checkpoint_with_noble_in_its_config_gets_new_branches(tmp_path):
    model, inputs = dit()
    model.save_pretrained(tmp_path)
    settings = NobleConfig(rank=4, mode="add-on")
    wanted = output(settings.convert(model), inputs)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "lissom_training", "method": "noble", "version": 1, "settings": {"rank": 4, "mode": "add-on"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(output(type(model).from_pretrained(tmp_path), inputs), wanted)
