"""What the native pass does not do runs in transformers, with transformers' own result and one line that says why."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import close, random_ids, tiny_model
from transformers import DynamicCache, StaticCache

from lissom import Quantize
from lissom.decode import NativeDecode
from lissom.errors import UserError
from lissom.kernels import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")
EXACT = NativeDecode(kv="fp32")
IDS = random_ids(20)


class OwnCache(DynamicCache):
    """Of somebody who wants to see what is stored."""

    def __init__(self, config) -> None:
        super().__init__(config=config)
        self.seen = 0

    def update(self, *args, **kwargs):
        self.seen += 1
        return super().update(*args, **kwargs)


def gaps(model):
    mask = torch.ones_like(IDS)
    mask[0, [3, 4, 9]] = 0
    return model(IDS, attention_mask=mask)


def four_dimensional(model):
    mask = torch.zeros(1, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    mask[..., 5:, 3] = -torch.inf
    return model(IDS, attention_mask=mask)


def foreign_cache(model):
    cache = OwnCache(model.config)
    result = model(IDS, past_key_values=cache)
    assert cache.seen == len(model.model.layers)
    return result


def hooked(name):
    def run(model):
        heard = []
        hook = model.get_submodule(name).register_forward_hook(lambda *parts: heard.append(parts[-1]))
        try:
            result = model(IDS)
        finally:
            hook.remove()
        assert len(heard) == 1
        return result

    return run


def hooked_everywhere(model):
    heard = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *parts: heard.append(parts[0]))
    try:
        result = model(IDS)
    finally:
        hook.remove()
    assert model.model.layers[0].mlp in heard
    return result


def with_gradients(model):
    with torch.enable_grad():
        result = model(IDS)
    assert result.logits.requires_grad
    return result


def in_training(model):
    model.train()
    try:
        return model(IDS)
    finally:
        model.eval()


def configured(**changes):
    def run(model):
        for name, value in changes.items():
            setattr(model.config, name, value)
        try:
            return model(IDS)
        finally:
            for name in changes:
                setattr(model.config, name, False)

    return run


CASES = {
    "output_attentions is given": lambda model: model(IDS, output_attentions=True),
    "output_hidden_states is given": lambda model: model(IDS, output_hidden_states=True),
    "output_hidden_states is set in": configured(output_hidden_states=True),
    "labels is given": lambda model: model(IDS, labels=IDS),
    "inputs_embeds is given": lambda model: model(inputs_embeds=model.get_input_embeddings()(IDS)),
    "mask has more than one gap": gaps,
    "mask is not [rows, tokens]": four_dimensional,
    "is not one of 20 tokens": lambda model: model(IDS, attention_mask=torch.tensor([[0, 0, *[1] * 24]])),
    "position ids are not consecutive": lambda model: model(IDS, position_ids=torch.arange(20)[None] * 2),
    "not in order": lambda model: model(IDS, logits_to_keep=torch.tensor([7, 3])),
    "cache is a OwnCache": foreign_cache,
    "cache is a StaticCache": lambda m: m(IDS, past_key_values=StaticCache(config=m.config, max_cache_len=32)),
    "gradients are wanted": with_gradients,
    "in training mode": in_training,
}
HOOKS = {name: hooked(name) for name in ("model", "model.layers.1", "model.layers.0.mlp.up_proj", "lm_head")}


def compared(plain, ours) -> None:
    """All that a pass returns: loss, logits, attentions, hidden states."""
    assert plain.keys() == ours.keys()
    for name in plain.keys() - {"past_key_values"}:
        each = (
            zip(plain[name], ours[name], strict=True) if isinstance(plain[name], tuple) else [(plain[name], ours[name])]
        )
        for wanted, got in each:
            close(got, wanted)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("reason", [*CASES, *HOOKS, "every module"])
def test_results_are_those_of_transformers(reason, attention, calls, caplog):
    run = {"every module": hooked_everywhere, **CASES, **HOOKS}[reason]
    model = tiny_model("llama", attention)
    wanted = run(model)
    with caplog.at_level(logging.WARNING, "lissom"), EXACT(model):
        for _ in range(2):
            compared(wanted, run(model))
        assert not calls
        model(IDS)
    assert calls == [20]
    said = [record.message for record in caplog.records if record.name.startswith("lissom")]
    assert len(said) == 1 and "A pass runs without native decode: " in said[0]
    assert (reason if reason in CASES else "a module inside the model has a hook") in said[0]


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.embed_tokens"])
def test_hooks_see_layers_that_were_packed_for_the_block(name, before):
    model, heard = tiny_model("gemma3"), []

    def listen():
        return model.get_submodule(name).register_forward_hook(lambda *parts: heard.append(parts[-1]))

    hook = listen() if before else None
    with NativeDecode(weights="int8", kv="fp32")(model):
        hook = hook or listen()
        got = model(IDS).logits
        assert len(heard) == 1
        hook.remove()
        torch.testing.assert_close(model(IDS).logits, got, atol=1e-3 * float(got.abs().max()), rtol=0)
        assert len(heard) == 1


@torch.no_grad()
def test_attentions_that_the_config_asks_for(calls):
    model = tiny_model("llama", "eager")
    model.config.output_attentions = True
    wanted = model(IDS)
    with EXACT(model):
        compared(wanted, model(IDS))
    assert len(wanted.attentions) == 3 and not calls


@torch.no_grad()
def test_attentions_over_a_cache_that_was_filled_natively_are_refused():
    model = tiny_model("llama", "eager")
    with EXACT(model):
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(UserError, match="from the first pass on"):
            model(IDS[:, :1], past_key_values=cache, output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_over_a_cache_that_was_filled_natively(attention):
    """What hides keys is honoured; what does more is refused, and never left out."""
    model, more = tiny_model("llama", attention), IDS[:, :5]
    mask = torch.zeros(1, 1, 5, 25)
    mask[..., 20:] = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    mask[..., 3] = -torch.inf
    results = []
    for method in (None, EXACT):
        cache = DynamicCache(config=model.config)
        if method is None:
            model(IDS, past_key_values=cache)
            results.append(model(more, past_key_values=cache, attention_mask=mask).logits)
            continue
        with method(model):
            model(IDS, past_key_values=cache)
            results.append(model(more, past_key_values=cache, attention_mask=mask).logits)
            mask[..., 4] = -3.0
            with pytest.raises(UserError, match="more than visible or hidden"):
                model(more, past_key_values=cache, attention_mask=mask)
            with pytest.raises(UserError, match="between heads"):
                model(more, past_key_values=cache, attention_mask=mask.expand(1, 4, 5, -1))
    close(*results)


def uneven(architecture, change):
    """A model whose second layer is not like the first."""
    model = tiny_model(architecture)
    change(model.model.layers[1])
    return model


def widen(layer):
    for name, sizes in {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}.items():
        setattr(layer.mlp, name, torch.nn.Linear(*sizes, bias=False))


def doubling(name):
    """Make the module `name` one that computes twice as much, by a subclass whose name gives nothing away."""

    def change(model):
        module = model.get_submodule(name)

        def forward(self, *args, **kwargs):
            result = super(kind, self).forward(*args, **kwargs)
            return tuple(2 * part for part in result) if isinstance(result, tuple) else 2 * result

        kind = module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})

    return change


def own_head(model):
    class Ours(type(model)):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            result.logits = -result.logits
            return result

    model.__class__ = Ours


def see_the_future(model):
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


class Half(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrize(name):
    return lambda model: torch.nn.utils.parametrize.register_parametrization(
        model.get_submodule(name), "weight", Half()
    )


INNER = ["model.embed_tokens", "model.layers.1.input_layernorm", "model.norm", "model.rotary_emb", "lm_head"]


@pytest.mark.parametrize(
    "change,words",
    [
        *((doubling(name), f"{name} is a") for name in INNER),
        (own_head, "has a forward function of its own"),
        (see_the_future, "attention of layer 0 is not causal"),
        (parametrize("model.layers.1.mlp.up_proj"), "model.layers.1.mlp.up_proj.parametrizations.weight.0 is a Half"),
    ],
)
@torch.no_grad()
def test_a_module_of_somebody_else_computes_what_it_likes(change, words, caplog):
    model = tiny_model("llama")
    plain = model(IDS).logits
    change(model)
    wanted = model(IDS).logits
    assert (wanted - plain).abs().max() > 1e-3
    with caplog.at_level(logging.WARNING, "lissom"), NativeDecode()(model):
        assert model(IDS).logits.equal(wanted)
    assert words in caplog.text


UNEVEN = [
    ("llama", widen, "layers.1.gate_proj is 128 x 64 and not 96 x 64"),
    ("qwen2", widen, "layers.1.gate_proj is 128 x 64 and not 96 x 64"),
    ("llama", lambda layer: setattr(layer.self_attn, "scaling", 0.5), "layer 1 has another activation or scale"),
    ("gemma3", lambda layer: setattr(layer.mlp, "act_fn", torch.nn.SiLU()), "layer 1 has another activation or scale"),
    ("qwen3", lambda layer: setattr(layer.self_attn.k_norm, "variance_epsilon", 0.1), "layers.1.k_norm has another"),
]


@pytest.mark.parametrize(
    "build,words",
    [
        *((lambda case=case: uneven(*case[:2]), case[2]) for case in UNEVEN),
        (lambda: tiny_model("gpt2"), "architecture 'gpt2' is not supported"),
        (lambda: tiny_model("phi3", intermediate_size=90), "gate_up_proj has 180 outputs, which do not divide"),
        (lambda: tiny_model("llama").double(), "q_proj is torch.float64"),
        (lambda: tiny_model("llama", hidden_act="mish"), "activation 'mish' is not supported"),
    ],
)
@torch.no_grad()
def test_models_that_are_not_supported_run_as_before(build, words, caplog):
    model = build()
    wanted = model(IDS).logits
    with caplog.at_level(logging.WARNING, "lissom"), NativeDecode()(model):
        assert model(IDS).logits.equal(wanted)
    said = [record.message for record in caplog.records if record.name.startswith("lissom")]
    assert len(said) == 1 and words in said[0]


def exchange(model):
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)


def patch(model):
    layer = model.model.layers[1].mlp
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


def adapt(model):
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()


CHANGES = {
    "layers.1.up_proj is a Sequential": exchange,
    "forward function of model.layers.1.mlp": patch,
    "q_proj is torch.float64": lambda model: model.double(),
    "q_proj is a Linear of peft": adapt,
}


@torch.no_grad()
@pytest.mark.parametrize("words", CHANGES)
def test_a_model_that_becomes_what_is_not_supported(words, calls, caplog):
    """Inside the block: noticed at the next prompt, and at single tokens from then on."""
    model, change = tiny_model("llama"), CHANGES[words]
    with caplog.at_level(logging.WARNING, "lissom"), EXACT(model):
        model(IDS)
        change(model)
        cache = DynamicCache(config=model.config)
        parts = [model(IDS[:, :-1], past_key_values=cache).logits, model(IDS[:, -1:], past_key_values=cache).logits]
    assert calls == [20]
    close(torch.cat(parts, 1), model(IDS).logits)
    said = [record.message for record in caplog.records if record.name.startswith("lissom")]
    assert len(said) == 1 and words in said[0]


@torch.no_grad()
def test_a_model_that_leaves_the_cpu(calls, caplog):
    model = tiny_model("llama")
    with caplog.at_level(logging.WARNING, "lissom"), EXACT(model):
        model(IDS)
        model.to("meta")
        for ids in (IDS, IDS[:, :1]):
            assert model(ids.to("meta")).logits.is_meta
    assert calls == [20] and "the input is on meta" in caplog.text


@torch.no_grad()
def test_a_cache_that_left_the_cpu():
    model = tiny_model("llama")
    with EXACT(model):
        cache = model(IDS, use_cache=True).past_key_values
        for layer in cache.layers:
            for name, buffer in layer.store.buffers().items():
                setattr(layer.store, name, buffer.to("meta"))
        with pytest.raises(UserError, match="cache is on meta and the model on the CPU"):
            model(IDS[:, :1], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 32}, {"num_hidden_layers": 2}],
    ids=str,
)
def test_a_cache_of_another_model_is_refused(changes):
    model, other = tiny_model("llama"), tiny_model("llama", **changes)
    with EXACT(model), EXACT(other):
        cache = model(IDS, use_cache=True).past_key_values
        for ids in (IDS, IDS[:, :1]):
            with pytest.raises(UserError, match="The cache has"):
                other(ids, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_caches_of_half_models_go_in_and_out(architecture, dtype, calls):
    """What transformers has stored in fp16 or bf16 is gone on with, and what was stored natively read by it."""
    model = tiny_model(architecture).to(dtype)
    wanted = model(IDS, use_cache=False).logits.float()
    cache = model(IDS[:, :6]).past_key_values
    with EXACT(model):
        inside = model(IDS[:, 6:16], past_key_values=cache).logits
    outside = model(IDS[:, 16:], past_key_values=cache).logits
    got = torch.cat([inside.float(), outside.float()], 1)
    assert calls == [10] and (got - wanted[:, 6:]).abs().max() < 0.1 * wanted.abs().max()


def scale(model):
    model.model.layers[0].mlp.up_proj.weight.mul_(2)


def scale_all(model):
    for parameter in model.parameters():
        parameter.mul_(1.1)


def replace(model):
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(96, 64, bias=False)


def load_anew(model):
    model.load_state_dict({name: 0.9 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def reactivate(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()


def sharpen(model):
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.4


def blur(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 0.9


@torch.no_grad()
@pytest.mark.parametrize("first", [19, 1])
@pytest.mark.parametrize("change", [scale, scale_all, replace, load_anew])
def test_weights_that_change_are_noticed(change, first, calls):
    """When a prompt is read, be it of one token."""
    model = tiny_model("llama")
    with EXACT(model):
        model(IDS)
        change(model)
        cache = DynamicCache(config=model.config)
        got = [model(ids, past_key_values=cache).logits for ids in IDS.split([first, 20 - first], 1)]
    assert calls == [20, first, 20 - first]
    close(torch.cat(got, 1), model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("change", [reactivate, sharpen, blur])
def test_settings_that_change_are_noticed(change):
    model = tiny_model("llama")
    with EXACT(model):
        before = model(IDS).logits
        change(model)
        after = model(IDS).logits
    close(after, model(IDS).logits)
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("change", [scale_all, load_anew])
def test_a_model_that_changes_as_a_whole_is_noticed_at_every_token(change, calls):
    model, token = tiny_model("llama"), IDS[:, :1]
    with EXACT(model):
        model(token)
        change(model)
        got = model(token).logits
    assert calls == [1, 1]
    close(got, model(token).logits)


@torch.no_grad()
def test_packed_weights_that_change_are_noticed():
    model = Quantize(method="rtn").convert(tiny_model("llama"))
    with EXACT(model):
        before = model(IDS).logits
        layer = model.model.layers[0].mlp.up_proj
        layer.scales = 2 * layer.scales
        after = model(IDS).logits
        torch.testing.assert_close(after, model(IDS, output_hidden_states=True).logits, atol=0.05, rtol=0)
    assert (after - before).abs().max() > 1


class TestAdapters:
    @staticmethod
    def adapted(model):
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        return get_peft_model(model, config).eval()

    @torch.no_grad()
    @pytest.mark.parametrize("inner", [False, True])
    def test_those_that_are_active_count(self, inner, calls, caplog):
        model = tiny_model("llama")
        plain = copy.deepcopy(model)(IDS).logits
        adapted = self.adapted(model)
        wanted = adapted(IDS).logits
        with caplog.at_level(logging.WARNING, "lissom"), EXACT(model if inner else adapted):
            assert adapted(IDS).logits.equal(wanted) and not wanted.equal(plain)
            with adapted.disable_adapter():
                close(adapted(IDS).logits, plain)
        said = [record.message for record in caplog.records if record.name.startswith("lissom")]
        assert not calls and len(said) == 1 and "peft" in said[0]

    @torch.no_grad()
    def test_merged_ones_run_natively(self, calls):
        model = self.adapted(tiny_model("llama"))
        wanted = model(IDS).logits
        merged = model.merge_and_unload()
        with EXACT(merged):
            close(merged(IDS).logits, wanted)
        assert calls == [20]
