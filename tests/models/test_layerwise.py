from __future__ import annotations

import pytest
import torch
from tiny import ALL_ARCHITECTURES, ByteTokenizer, random_ids, tiny_model

from lissom.errors import UserError
from lissom.evals.texts import passages
from lissom.models.calibration import builtin_text, calibration_windows, tokenizer_of
from lissom.models.decoder import decoder_layers
from lissom.models.layerwise import LayerRunner, observing


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_layer_by_layer_is_the_model(architecture):
    model, ids = tiny_model(architecture), random_ids(24, rows=3)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    runner = LayerRunner(model, ids)
    for number in range(len(decoder_layers(model)[1])):
        runner.hidden = runner.outputs(number)
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    final = model(ids, output_hidden_states=True).hidden_states[-1]
    norm = model.transformer.ln_f if architecture == "gpt2" else model.model.norm
    torch.testing.assert_close(norm(torch.cat(runner.hidden)), final, rtol=1e-4, atol=1e-4)


def test_layers_that_depend_on_more_are_refused():
    model = tiny_model("llama")
    layer, forward = model.model.layers[1], model.model.layers[1].forward
    calls = iter(range(1000))
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * (1 + next(calls))
    with pytest.raises(UserError, match="one by one"):
        LayerRunner(model, random_ids(24, rows=2))


def test_inputs_that_are_one_tensor_are_observed_once():
    model, ids = tiny_model("llama"), random_ids(24, rows=2)
    attention = model.model.layers[0].self_attn
    modules = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    seen: dict[str, list[torch.Tensor]] = {}
    with observing(modules, lambda name: seen.setdefault(name, []).append) as leaders:
        model(ids[:1])
        model(ids[1:])
    assert leaders == {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj"}
    assert {name: [tuple(x.shape) for x in inputs] for name, inputs in seen.items()} == {
        "q_proj": [(24, 64)] * 2,
        "o_proj": [(24, 64)] * 2,
    }


def test_the_calibration_text_is_none_that_is_evaluated_on():
    text = builtin_text()
    assert len(text) > 100_000
    assert not any(part[:200] in text for _, part in passages())


def test_windows(tmp_path):
    ids = calibration_windows(ByteTokenizer(), None, 2000, 512)
    assert ids.shape == (3, 512) and ids.dtype == torch.int64
    (tmp_path / "a.txt").write_text("0123456789" * 52)
    assert calibration_windows(ByteTokenizer(), tmp_path / "a.txt", 512, 512).shape == (1, 512)
    with pytest.raises(UserError, match="has 520 tokens, but 1024"):
        calibration_windows(ByteTokenizer(), tmp_path / "a.txt", 1024, 512)
    with pytest.raises(UserError, match="cannot be read"):
        calibration_windows(ByteTokenizer(), tmp_path / "b.txt", 512, 512)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        calibration_windows(ByteTokenizer(), tmp_path / "c.txt", 512, 512)
    with pytest.raises(UserError, match="calibration needs one"):
        tokenizer_of(tiny_model("llama"))
