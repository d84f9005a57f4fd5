"""What people do with a running model: batches, beams, drafts, caches that go on, threads, Ctrl-C, odd inputs."""

from __future__ import annotations

import copy
import signal
import sys
import threading

import pytest
import torch
from tiny import DECODERS, close, random_ids, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor

from lissom.decode import NativeDecode, generate_tokens
from lissom.errors import UserError
from lissom.kernels import decoder, native
from lissom.kv.cache import CompactLayer

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels")
EXACT = NativeDecode(kv="fp32")
GREEDY = {"do_sample": False, "max_new_tokens": 14}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("weights", ["native", "int4"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_row_of_a_batch_says_what_it_says_alone(architecture, weights):
    """Of different lengths, padded on the left, and more of them than one pass takes at most."""
    model, ids = tiny_model(architecture), random_ids(20, rows=18)
    mask = (torch.arange(20) >= torch.arange(18)[:, None]).long()
    with NativeDecode(weights=weights, kv="fp32")(model):
        together = model.generate(ids * mask, attention_mask=mask, **GREEDY)[:, 20:]
        alone = [model.generate(ids[row : row + 1, row:], **GREEDY)[:, 20 - row :] for row in range(18)]
    assert together.equal(torch.cat(alone))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_drafts_leave_no_trace(architecture, noise, calls):
    """Assisted generation crops from the cache what it has guessed wrong."""
    model, ids = tiny_model(architecture), random_ids(6)
    assistant = copy.deepcopy(model)
    assistant.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + noise * torch.randn(128, 64))
    wanted = model.generate(ids, **GREEDY)
    assert model.generate(ids, **GREEDY, assistant_model=assistant).equal(wanted)
    with EXACT(model), EXACT(assistant):
        assert model.generate(ids, **GREEDY, assistant_model=assistant).equal(wanted)
    assert sum(tokens > 1 for tokens in calls) > 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral"])
def test_beams(architecture, calls):
    model, ids = tiny_model(architecture), random_ids(10, rows=2)
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 3}
    wanted = model.generate(ids, **options)
    with EXACT(model):
        assert model.generate(ids, **options).equal(wanted)
    assert len(calls) == 14


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "smollm3"])
def test_caches_are_repeated_selected_and_reordered(architecture):
    model, ids, more = tiny_model(architecture), random_ids(15, rows=3), random_ids(4, rows=5, seed=1)
    rows = torch.tensor([2, 0, 0, 1, 2])
    wanted = model(torch.cat([ids[rows], more], 1)).logits[:, -4:]
    with EXACT(model):
        cache = model(ids, use_cache=True).past_key_values
        reordered, repeated = copy.deepcopy(cache), copy.deepcopy(cache)
        cache.batch_select_indices(rows)
        close(model(more, past_key_values=cache).logits, wanted)
        reordered.reorder_cache(torch.tensor([1, 2, 0]))
        close(model(more[[3, 0, 1]], past_key_values=reordered).logits, wanted[[3, 0, 1]])
        repeated.batch_repeat_interleave(2)
        got = model(more[[1, 1, 3, 3, 0, 0]], past_key_values=repeated).logits
        close(got, wanted[[1, 1, 3, 3, 0, 0]])
        with pytest.raises(UserError, match="rows of"):
            model(more[:2], past_key_values=repeated)


@pytest.mark.parametrize("record", [True, False])
def test_windows_keep_what_a_crop_may_want_back(record):
    model, ids = tiny_model("mistral"), random_ids(200)
    wanted = model(ids).logits
    with EXACT(model):
        cache = DynamicCache(config=model.config)
        if record:
            cache.activate_past_recording()
        model(ids[:, :20], past_key_values=cache)
        cache.crop(0)
        for token in ids[:, 20:195].split(1, 1):
            model(token, past_key_values=cache)
        if not record:
            with pytest.raises(UserError, match="gone already"):
                cache.crop(-174)
            return
        cache.crop(-174)
        close(model(ids[:, 21:], past_key_values=cache).logits, wanted[:, 21:])
        cache.crop(-179)
        close(model(ids[:, 21:], past_key_values=cache).logits, wanted[:, 21:])
        assert all(layer.tail <= 7 + 179 for layer in cache.layers)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_conversation_goes_on_where_it_was_cropped(architecture):
    model, ids = tiny_model(architecture), random_ids(30)
    with EXACT(model):
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == 43
        cache.crop(-3)
        with pytest.raises(UserError, match="negative number"):
            cache.crop(20)
        assert model.generate(first[:, :41], past_key_values=cache, do_sample=False, max_new_tokens=3).equal(first)


ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    "changes", [{}, {"rope_parameters": ROPE, "max_position_embeddings": 8}], ids=["plain", "dynamic"]
)
def test_threads_do_not_meet(changes):
    """Of the same model, each with a cache of its own, at switches as frequent as Python allows."""
    model = tiny_model("llama", **changes)
    caches = [DynamicCache(config=model.config) for _ in range(4)]
    prompts = [random_ids(20, seed=n, rows=n % 2 + 1) for n in range(4)]
    failed, interval = [], sys.getswitchinterval()

    def run(n: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(25):
                    tokens = generate_tokens(model, prompts[n], max_new_tokens=6, stop=[])
                    assert torch.stack(list(tokens), 1).equal(wanted[n])
                for part in prompts[n].split(1, 1):
                    model(part, past_key_values=caches[n])
        except BaseException as error:
            failed.append(error)

    with EXACT(model):
        wanted = [torch.stack(list(generate_tokens(model, ids, max_new_tokens=6, stop=[])), 1) for ids in prompts]
        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        assert not failed and [cache.get_seq_length() for cache in caches] == [20] * 4


def consistent(model, cache, ids) -> None:
    """Whatever `cache` holds is what `ids` begin with, in every layer, and can be gone on with."""
    read = {layer.get_seq_length() for layer in cache.layers}
    assert len(read) == 1 and not any(layer.store is not None and layer.store.uncounted for layer in cache.layers)
    length = read.pop()
    if length < ids.shape[1]:
        close(model(ids[:, length:], past_key_values=cache).logits, model(ids).logits[:, length:])


class Interrupt(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, ids, scores):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return scores


class Streamer:
    def __init__(self, after: int) -> None:
        self.left = after

    def put(self, tokens) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("where", [lambda: {"streamer": Streamer(6)}, lambda: {"logits_processor": [Interrupt(5)]}])
def test_an_interrupt_from_a_callback(architecture, where):
    model, ids = tiny_model(architecture), random_ids(20)
    whole = model.generate(ids, **GREEDY)
    with EXACT(model):
        cache = DynamicCache(config=model.config)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, past_key_values=cache, **GREEDY, **where())
        assert 20 < cache.get_seq_length() < 30
        consistent(model, cache, whole)
        assert model.generate(ids, **GREEDY).equal(whole)
    assert model.generate(ids, **GREEDY).equal(whole)


@pytest.mark.parametrize("stop", range(8))
def test_an_interrupt_between_the_layers(stop, monkeypatch):
    """After the native call, before or while each layer counts what was appended."""
    model, ids, counts = tiny_model("gemma3"), random_ids(20), []
    advance, decode = CompactLayer.advance, decoder.decode

    def interrupted_advance(self, tokens):
        counts.append(1)
        if len(counts) == stop:
            raise KeyboardInterrupt
        advance(self, tokens)

    def interrupted_decode(*arguments):
        decode(*arguments)
        if stop == 0 and not counts:
            counts.append(1)
            raise KeyboardInterrupt

    with EXACT(model):
        cache = model(ids[:, :9], use_cache=True).past_key_values
        monkeypatch.setattr(CompactLayer, "advance", interrupted_advance)
        monkeypatch.setattr(decoder, "decode", interrupted_decode)
        try:
            model(ids[:, 9:12], past_key_values=cache)
        except KeyboardInterrupt:
            pass
        else:
            assert stop > 4
        monkeypatch.undo()
        assert cache.get_seq_length() == 12
        consistent(model, cache, ids)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_signals_at_any_time(architecture):
    """Wherever Ctrl-C comes in a pass, the cache holds the beginning of what was read, in every layer."""
    model, ids = tiny_model(architecture), random_ids(60)

    def interrupt(*unused):
        raise KeyboardInterrupt

    before, hits = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        with NativeDecode(kv="fp32")(model):
            for trial in range(150):
                cache = DynamicCache(config=model.config)
                model(ids[:, :1], past_key_values=cache)
                try:
                    signal.setitimer(signal.ITIMER_REAL, 2e-5 * (1 + trial))
                    for part in ids[:, 1:50].split(1 + trial % 7, 1):
                        model(part, past_key_values=cache)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    hits += 1
                consistent(model, cache, ids)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 20


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_and_positions_of_other_integers(dtype, calls):
    model, ids = tiny_model("llama"), random_ids(20, rows=2)
    wanted = model(ids).logits
    with EXACT(model):
        got = model(
            ids.to(dtype), position_ids=torch.arange(20)[None].to(dtype), attention_mask=torch.ones(2, 20)
        ).logits
    close(got, wanted)
    assert calls == [20]


@pytest.mark.parametrize("place", ["prompt", "steps"])
@pytest.mark.parametrize("setting", [torch.bfloat16, torch.float64, "meta"], ids=str)
def test_pytorch_s_defaults_change_nothing(setting, place, calls):
    model, ids = tiny_model("qwen3"), random_ids(40)
    wanted = model(ids).logits
    before = torch.get_default_dtype()
    parts = [40] if place == "prompt" else [30, *[1] * 10]
    with NativeDecode(weights="native", kv="fp32")(model):
        (torch.set_default_device if setting == "meta" else torch.set_default_dtype)(setting)
        try:
            cache = DynamicCache(config=model.config)
            got = [model(part, past_key_values=cache).logits for part in ids.split(parts, 1)]
            text = list(generate_tokens(model, ids, max_new_tokens=3, stop=[]))
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(before)
    close(torch.cat(got, 1), wanted)
    assert len(text) == 3 and calls[: len(parts)] == parts


def test_inference_mode_may_come_and_go():
    model, ids = tiny_model("gemma3"), random_ids(40)
    wanted = model(ids).logits
    with EXACT(model):
        with torch.inference_mode():
            cache = model(ids[:, :20], use_cache=True).past_key_values
        got = [model(ids[:, 20:25], past_key_values=cache).logits]
        cache.crop(-2)
        model(ids[:, 23:25], past_key_values=cache, output_hidden_states=True)
        with torch.inference_mode():
            got.append(model(ids[:, 25:], past_key_values=cache).logits)
    close(torch.cat(got, 1), wanted[:, 20:])
    with torch.inference_mode():
        made = tiny_model("gemma3")
        with EXACT(made):
            close(made(ids).logits, wanted)


def test_a_row_that_is_all_padding_harms_no_other():
    model, ids = tiny_model("llama"), random_ids(20, rows=3)
    mask = torch.ones_like(ids)
    mask[1] = 0
    wanted = model(ids).logits
    with EXACT(model):
        got = model(ids, attention_mask=mask).logits
    close(got[::2], wanted[::2])
    assert got.isfinite().all()


def test_an_empty_input_is_one_sentence():
    model = tiny_model("llama")
    with EXACT(model), pytest.raises(UserError, match=r"nothing to read: the input has the shape \[1, 0\]"):
        model(random_ids(3)[:, :0])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("weights", ["native", "int8", "int4", "bf16"])
def test_what_is_saved_inside_a_block_is_the_model(architecture, weights, tmp_path):
    model, ids = tiny_model(architecture), random_ids(9)
    wanted, state = model(ids).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with NativeDecode(weights=weights)(model):
        model(ids)
        inside = model.state_dict()
        model.save_pretrained(tmp_path)
    assert list(inside) == list(state) and all(inside[name].equal(tensor) for name, tensor in state.items())
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert again(ids).logits.equal(wanted) and not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
def test_damaged_keys_and_values_show(kv):
    """A NaN that got into the cache is not read as a number."""
    model, ids = tiny_model("llama"), random_ids(12)
    for name in ("keys", "values"):
        for later in (ids[:, :1], ids.repeat(1, 3)):
            with NativeDecode(kv=kv)(model):
                cache = model(ids, use_cache=True).past_key_values
                store = cache.layers[0].store
                (getattr(store, name) if kv != "int8" else getattr(store, f"{name[:-1]}_scales"))[:] = torch.nan
                assert model(later, past_key_values=cache).logits.isnan().all()
