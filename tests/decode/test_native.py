"""Native passes against transformers' own on tiny models of every supported architecture."""

from __future__ import annotations

import copy
import gc
import os
import threading

import pytest
import torch
from tiny import DECODERS, close, random_ids, tiny_model
from transformers import DynamicCache

from lissom.decode import NativeDecode, generate_tokens
from lissom.errors import UserError
from lissom.kernels import native
from lissom.kv import AttentionMatching, Eviction, KVBudget
from lissom.kv.cache import WindowLayer
from lissom.models.attention import installed

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")
EXACT = NativeDecode(kv="fp32")


@torch.no_grad()
@pytest.mark.parametrize("architecture", DECODERS)
def test_logits_are_those_of_transformers(architecture, calls):
    model, ids = tiny_model(architecture), random_ids(40, rows=2)
    wanted = model(ids).logits
    with EXACT(model):
        close(model(ids).logits, wanted)
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :20], past_key_values=cache).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 36)]
        parts += [model(ids[:, 36:], past_key_values=cache).logits]
    close(torch.cat(parts, 1), wanted)
    assert calls == [40, 20, *[1] * 16, 4]
    assert model(ids).logits.equal(wanted)  # restored, bit for bit


@torch.no_grad()
@pytest.mark.parametrize("isa", native.available_isas())
def test_every_instruction_set_agrees(isa):
    model, ids = tiny_model("gemma3"), random_ids(30, rows=3)
    wanted = model(ids).logits
    before = native.status().isa
    native.set_isa(isa)
    try:
        with EXACT(model):
            close(model(ids).logits, wanted)
    finally:
        native.set_isa(before)


@torch.no_grad()
@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_the_same_tokens_with_left_padding(architecture, beams, calls):
    model, ids = tiny_model(architecture), random_ids(30, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[2, :19] = 0, 0
    settings = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "num_beams": beams}
    wanted = model.generate(ids, **settings)
    with EXACT(model):
        assert model.generate(ids, **settings).equal(wanted)
    assert len(calls) == 16


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotations(rope):
    changes = {"rope_parameters": {"rope_theta": 1e4, **rope}, "max_position_embeddings": 48}
    model, ids = tiny_model("llama", **changes), random_ids(90)
    wanted = model(ids).logits
    with EXACT(model):
        close(model(ids).logits, wanted)
        close(model(ids[:, :40]).logits, _plain(model, ids[:, :40]))


def _plain(model, ids):
    other = copy.deepcopy(model)
    return other(ids).logits


@torch.no_grad()
@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
def test_packed_weights_compute_the_same_natively_and_in_a_fallback(weights):
    model, ids = tiny_model("llama"), random_ids(40)
    wanted = model(ids).logits
    with NativeDecode(weights=weights, kv="fp32")(model):
        got, again = model(ids).logits, model(ids, output_hidden_states=True).logits
    error, rounding = (got - wanted).abs().mean(), (got - again).abs().mean()
    assert rounding < 0.35 * error + 1e-3 and 0 < error < {"int8": 0.2, "int4": 4.0, "bf16": 0.1}[weights]
    assert model(ids).logits.equal(wanted)
    assert type(model.lm_head) is torch.nn.Linear


@torch.no_grad()
def test_a_bfloat16_model_is_as_exact_as_its_weights():
    model, ids = tiny_model("qwen3"), random_ids(60)
    exact = model.bfloat16().float()(ids).logits.double()
    rounded = copy.deepcopy(model).bfloat16()
    plain = rounded(ids).logits.double()
    with NativeDecode()(rounded):
        ours = rounded(ids).logits.double()
    assert (ours - exact).abs().mean() < (plain - exact).abs().mean()


@torch.no_grad()
def test_int8_keys_and_values_are_close_and_half_as_large():
    model, ids = tiny_model("qwen3"), random_ids(200)
    caches = {}
    with torch.no_grad():
        wanted = model(ids).logits
    for kv in ("bf16", "int8"):
        with NativeDecode(kv=kv)(model):
            out = model(ids, use_cache=True)
        caches[kv] = out.past_key_values
        assert (out.logits - wanted).abs().mean() < 0.06 * wanted.abs().mean(), kv
    stored = {kv: cache.layers[0].store.keys.nbytes for kv, cache in caches.items()}
    assert stored["int8"] * 2 == stored["bf16"]


@torch.no_grad()
def test_a_window_bounds_the_storage(calls):
    model, ids = tiny_model("mistral"), random_ids(8)
    wanted = model.generate(ids, max_new_tokens=100, do_sample=False)
    with EXACT(model):
        out = model.generate(ids, max_new_tokens=100, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.equal(wanted)
    assert all(isinstance(layer, WindowLayer) and layer.tail <= 16 for layer in out.past_key_values.layers)


@torch.no_grad()
def test_long_prompts_are_read_in_stretches():
    model, ids = tiny_model("gemma3", max_position_embeddings=2048), random_ids(1300)
    wanted = model(ids).logits
    with EXACT(model):
        close(model(ids).logits, wanted)
        close(model(ids, logits_to_keep=700).logits, wanted[:, -700:])
        kept = torch.tensor([3, 600, 1299])
        close(model(ids, logits_to_keep=kept).logits, wanted[:, kept])


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_cache_can_be_cropped_copied_and_gone_on_with(architecture):
    model, ids = tiny_model(architecture), random_ids(12)
    with EXACT(model):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        other = copy.deepcopy(cache)
        one = model(ids[:, 9:], past_key_values=cache).logits
        cache.crop(-3)
        assert model(ids[:, 9:], past_key_values=cache).logits.equal(one)
        assert model(ids[:, 9:], past_key_values=other).logits.equal(one)
        cache.batch_repeat_interleave(2)
        two = model(ids[:, -1:].repeat(2, 1), past_key_values=cache).logits
        assert two[0].equal(two[1])
        cache.batch_select_indices(torch.tensor([1]))
    # Outside the block the same cache goes on in transformers' own passes.
    fresh = DynamicCache(config=model.config)
    model(torch.cat([ids, ids[:, -1:]], 1), past_key_values=fresh)
    wanted = model(ids[:, :5], past_key_values=fresh).logits
    close(model(ids[:, :5], past_key_values=copy.deepcopy(cache)).logits, wanted)
    with installed(model):
        close(model(ids[:, :5], past_key_values=cache).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_native_and_other_passes_take_turns(architecture, calls):
    model, ids = tiny_model(architecture), random_ids(40)
    wanted = model(ids).logits
    with EXACT(model):
        cache = DynamicCache(config=model.config)
        parts = [model(ids[:, :10], past_key_values=cache).logits]
        parts.append(
            model(ids[:, 10:20], past_key_values=cache, output_attentions=False, output_hidden_states=True).logits
        )
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 30)]
        parts.append(model(inputs_embeds=model.get_input_embeddings()(ids[:, 30:]), past_key_values=cache).logits)
    close(torch.cat(parts, 1), wanted)
    assert calls == [10, *[1] * 10]


@torch.no_grad()
def test_tokens_outside_the_vocabulary_are_refused_and_nothing_is_read():
    model = tiny_model("llama")
    with EXACT(model):
        cache = model(random_ids(5), use_cache=True).past_key_values
        with pytest.raises(UserError, match="outside the vocabulary"):
            model(torch.tensor([[500]]), past_key_values=cache)
        assert cache.get_seq_length() == 5
        close(model(random_ids(1), past_key_values=cache).logits, _continued(model, random_ids(5), random_ids(1)))


def _continued(model, ids, more):
    return _plain(model, torch.cat([ids, more], 1))[:, -more.shape[1] :]


@torch.no_grad()
def test_nan_weights_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"), NativeDecode()(model):
        pass
    model(random_ids(3))  # usable


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "method", [AttentionMatching(ratio=0.3, min_tokens=32), Eviction(ratio=0.3, min_tokens=32)], ids=str
)
def test_compaction_goes_on_natively(architecture, method, calls):
    """Prompt, repeat pass and the tokens behind them are native, biases included."""
    model, ids = tiny_model(architecture), random_ids(80)
    with method(model):
        wanted = model.generate(
            ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    with EXACT(model), method(model):
        got = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert calls[0] == 80 and calls[-7:] == [1] * 7
    full = [layer for layer in got.past_key_values.layers if not layer.is_sliding]
    assert all(layer.store.lengths.max() < 50 for layer in full)
    close(torch.stack(got.logits), torch.stack(wanted.logits))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["streaming-llm", "h2o"])
def test_a_budget_is_kept_natively(kind, calls):
    model, ids = tiny_model("llama"), random_ids(60)
    budget = KVBudget("20KB", kind, protect=4)
    with budget(model):
        wanted = model.generate(ids, max_new_tokens=60, do_sample=False)
    with EXACT(model), budget(model):
        out = model.generate(ids, max_new_tokens=60, do_sample=False, return_dict_in_generate=True)
    assert out.sequences.equal(wanted)
    assert sum(layer.stored_bytes for layer in out.past_key_values.layers) <= 20_000
    assert len(calls) == 60


@torch.no_grad()
def test_two_threads_at_once():
    model = tiny_model("llama")
    prompts = [random_ids(20 + n, seed=n) for n in range(4)]
    wanted = [model.generate(ids, max_new_tokens=30, do_sample=False) for ids in prompts]
    got: dict[int, list[bool]] = {n: [] for n in range(4)}

    def run(n: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                got[n].append(bool(model.generate(prompts[n], max_new_tokens=30, do_sample=False).equal(wanted[n])))

    with EXACT(model):
        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(len(ok) == 5 and all(ok) for ok in got.values())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_runs_on_its_own():
    model, ids = tiny_model("llama"), random_ids(20)
    with EXACT(model):
        wanted = model(ids).logits
        pid = os.fork()
        if pid == 0:
            os._exit(0 if model(ids).logits.equal(wanted) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert model(ids).logits.equal(wanted)


@torch.no_grad()
def test_the_number_of_threads_changes_nothing():
    model, ids = tiny_model("gemma3"), random_ids(700)
    before = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            with NativeDecode(weights="int4")(model):
                out = model(ids[:, :650], use_cache=True)
                results.append(
                    torch.cat([out.logits, model(ids[:, 650:660], past_key_values=out.past_key_values).logits], 1)
                )
    finally:
        torch.set_num_threads(before)
    assert results[0].equal(results[1]) and results[0].equal(results[2])


@torch.no_grad()
def test_an_interrupt_leaves_the_model_usable():
    model, ids = tiny_model("llama"), random_ids(20)
    wanted = [int(token) for token in generate_tokens(model, ids, max_new_tokens=10, stop=[])]
    with EXACT(model):
        with pytest.raises(KeyboardInterrupt):
            for number, _ in enumerate(generate_tokens(model, ids, max_new_tokens=50, stop=[])):
                if number == 5:
                    raise KeyboardInterrupt
        assert [int(token) for token in generate_tokens(model, ids, max_new_tokens=10, stop=[])] == wanted
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_blocks_leave_nothing_behind():
    model, ids = tiny_model("llama"), random_ids(20)
    attention = model.config._attn_implementation
    for _ in range(3):
        with NativeDecode()(model), NativeDecode(weights="int8")(model):
            model(ids)
    gc.collect()
    assert model.config._attn_implementation == attention and "forward" not in model.__dict__


@pytest.mark.parametrize("settings", [{"weights": "int3"}, {"kv": "int2"}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        NativeDecode(**settings)
