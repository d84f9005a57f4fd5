from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import ARCHITECTURES, random_ids, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, Lfm2Config, LlamaConfig, MambaConfig, MistralConfig

import lissom
from lissom.errors import UserError
from lissom.kv import file
from lissom.kv.eviction import SCORES
from lissom.models.attention import uninstall

DOCUMENT, QUESTION = random_ids(100), random_ids(7, seed=1)
BOTH = torch.cat([DOCUMENT, QUESTION], 1)


def whole(model, ids=DOCUMENT, **options):
    return lissom.compact(model, ids, ratio=1.0, queries="context", **options)


def greedy(model, ids, cache=None, **options):
    return model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
class TestRatioOneIsTheFullCache:
    def test_logits(self, architecture, attention):
        model = tiny_model(architecture, attention)
        with torch.no_grad():
            wanted = model(BOTH).logits[:, -7:]
            cache = whole(model)
            at_once = model(QUESTION, past_key_values=cache.copy()).logits
            one_by_one = [model(QUESTION[:, i : i + 1], past_key_values=cache).logits for i in range(7)]
        torch.testing.assert_close(at_once, wanted, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cat(one_by_one, 1), wanted, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
    def test_generate(self, architecture, attention, options):
        model = tiny_model(architecture, attention)
        wanted = greedy(model, BOTH, **options)
        assert torch.equal(greedy(model, BOTH, whole(model), **options), wanted)

    def test_left_padded_batch(self, architecture, attention):
        model = tiny_model(architecture, attention)
        ids = random_ids(80, rows=2, seed=2)
        mask = (torch.arange(80) >= torch.tensor([[30], [0]])).long()
        ids = ids * mask
        cache = whole(model, {"input_ids": ids, "attention_mask": mask})
        question_mask = torch.ones(2, 7, dtype=torch.long)
        question_mask[1, :3] = 0
        question = QUESTION.repeat(2, 1) * question_mask
        both, both_mask = torch.cat([ids, question], 1), torch.cat([mask, question_mask], 1)
        wanted = greedy(model, both, attention_mask=both_mask)
        assert torch.equal(greedy(model, both, cache, attention_mask=both_mask), wanted)


METHODS = [
    *(lissom.Eviction(ratio=0.3, score=score) for score in SCORES),
    *(
        lissom.AttentionMatching(ratio=0.3, **options)
        for options in (
            {},
            {"budgets": "uniform"},
            {"queries": "context"},
            {"select": "omp"},
            {"select": "omp-fast"},
            {"select": "omp-progressive"},
            {"select": "random"},
            {"on_policy": True},
            {"exact": True},
            {"bias": False, "fit_values": False},
        )
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: str(m.settings())[:60])
def test_every_method_keeps_its_budget_and_stays_finite(architecture, method):
    model = tiny_model(architecture)
    cache = lissom.compact(model, DOCUMENT, method)
    for _, layer in cache.compact_layers():
        lengths = layer.store.lengths.tolist()
        if method.sharing == "uniform":
            assert lengths == [30] * len(lengths)
        assert min(lengths) >= 5 and layer.get_seq_length() == 100
    total = 30 * sum(len(layer.store.lengths) for _, layer in cache.compact_layers())
    pursuit = getattr(method, "select", "").startswith("omp")  # its refinement may end with fewer
    assert 0.7 * total <= cache.stored_entries <= total if pursuit else cache.stored_entries == total
    with torch.no_grad():
        assert model(QUESTION, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matching_beats_random_and_no_fit(architecture):
    model = tiny_model(architecture)
    with torch.no_grad():
        wanted = model(BOTH).logits[:, -7:]

        def error(**options):
            cache = lissom.compact(model, DOCUMENT, lissom.AttentionMatching(ratio=0.3, **options))
            return float((model(QUESTION, past_key_values=cache).logits - wanted).norm())

        assert error() < error(select="random", bias=False, fit_values=False)


def test_on_policy_first_layer_equals_off_policy_and_later_ones_differ():
    model = tiny_model("llama")
    off = lissom.compact(model, DOCUMENT, ratio=0.3, budgets="uniform")
    on = lissom.compact(model, DOCUMENT, ratio=0.3, on_policy=True)
    torch.testing.assert_close(on.layers[0].store.values, off.layers[0].store.values)
    assert not torch.allclose(on.layers[2].store.values, off.layers[2].store.values)


def test_stored_bytes_are_near_the_ratio():
    model = tiny_model("llama")
    full = whole(model)
    small = lissom.compact(model, DOCUMENT, ratio=0.1)
    assert small.stored_entries * 10 == full.stored_entries
    assert small.stored_bytes / full.stored_bytes == pytest.approx(0.1, rel=0.15)
    assert sum(layer.nbytes for _, layer in small.compact_layers()) == small.stored_bytes


def test_planted_nan_in_padding_is_never_read():
    model = tiny_model("llama")
    ids = random_ids(40, rows=2)
    mask = (torch.arange(40) >= torch.tensor([[15], [0]])).long()
    cache = lissom.compact(model, {"input_ids": ids, "attention_mask": mask}, ratio=0.5)
    for _, layer in cache.compact_layers():
        assert int(layer.store.block(0).positions.min()) >= 15


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transparent_use_restores_the_model(architecture):
    model = tiny_model(architecture)
    wanted = greedy(model, BOTH)
    with lissom.AttentionMatching(ratio=1.0, queries="context")(model):
        assert torch.equal(greedy(model, BOTH), wanted)
    with lissom.AttentionMatching(ratio=0.2, queries="context")(model):
        cache = DynamicCache(config=model.config)
        model(BOTH, past_key_values=cache)
        kept = [layer.store.lengths.tolist() for layer in cache.layers if hasattr(layer, "store")]
        assert kept and all(length == 21 for lengths in kept for length in lengths)
    assert model.config._attn_implementation == "sdpa" and not model._forward_hooks and not model._forward_pre_hooks
    assert torch.equal(greedy(model, BOTH), wanted)


def test_an_error_inside_the_block_restores_the_model_too():
    model = tiny_model("llama")
    with pytest.raises(RuntimeError), lissom.Eviction()(model):
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa" and not model._forward_hooks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_file_round_trip(architecture, tmp_path):
    model = tiny_model(architecture)
    cache = lissom.compact(model, DOCUMENT, ratio=0.3)
    file.save(cache, tmp_path / "c.safetensors", model, tokens=DOCUMENT, settings={"ratio": 0.3})
    again, tokens, settings = file.load(tmp_path / "c.safetensors", model)
    assert torch.equal(tokens, DOCUMENT) and settings == {"ratio": 0.3}
    assert again.stored_bytes == cache.stored_bytes
    assert torch.equal(greedy(model, BOTH, again), greedy(model, BOTH, cache))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_bad_files_are_refused(tmp_path):
    model, other = tiny_model("llama"), tiny_model("qwen3")
    path = tmp_path / "c.safetensors"
    with pytest.raises(UserError, match="no cache file"):
        file.load(path, model)
    file.save(lissom.compact(model, DOCUMENT, ratio=0.3), path, model)
    with pytest.raises(UserError, match="another model"):
        file.load(path, other)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="no readable cache file"):
        file.load(path, model)


def test_any_damage_to_a_file_is_seen(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "c.safetensors"
    file.save(lissom.compact(model, DOCUMENT, ratio=0.3), path, model, tokens=DOCUMENT.repeat(2, 1)[:1, :50])
    whole = path.read_bytes()
    for place in range(9, len(whole), len(whole) // 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(UserError):
            file.load(path, model)
    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            file.load(path, model)


def test_several_threads_may_generate_in_one_block():
    model, method = tiny_model("llama"), lissom.AttentionMatching(ratio=0.2, queries="context")
    with method(model):

        def read(seed):
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(random_ids(100, seed=seed), past_key_values=cache, use_cache=True)
            return [layer.store.lengths.tolist() for layer in cache.layers]

        with ThreadPoolExecutor(8) as pool:
            assert all(lengths == [[20, 20]] * 3 for lengths in pool.map(read, range(24)))


def test_blocks_may_be_left_in_any_order():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    first, second = lissom.AttentionMatching(ratio=0.5)(model), lissom.Eviction(ratio=0.5)(model)
    first.__enter__()
    second.__enter__()
    assert torch.is_grad_enabled()
    first.__exit__(None, None, None)
    greedy(model, DOCUMENT)
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == before and torch.is_grad_enabled()


def test_a_prompt_of_embeddings_is_refused():
    model = tiny_model("llama")
    embeddings = model.get_input_embeddings()(DOCUMENT)
    with lissom.AttentionMatching(ratio=0.5)(model), pytest.raises(UserError, match="embeddings"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2)


def test_crop_and_reset():
    model = tiny_model("llama")
    cache = lissom.compact(model, DOCUMENT, ratio=0.3)
    with torch.no_grad():
        wanted = model(QUESTION, past_key_values=cache.copy()).logits
        model(random_ids(5, seed=9), past_key_values=cache)
        cache.crop(-5)
        torch.testing.assert_close(model(QUESTION, past_key_values=cache).logits, wanted)
    with pytest.raises(UserError, match="can be removed"):
        cache.crop(-50)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.stored_bytes == 0


def test_several_questions_of_one_document_in_one_batch():
    model = tiny_model("llama")
    cache = lissom.compact(model, DOCUMENT, ratio=0.3)
    questions = random_ids(7, rows=3, seed=4)
    ids = torch.cat([DOCUMENT.repeat(3, 1), questions], 1)
    together = greedy(model, ids, cache.copy())
    for row in range(3):
        assert torch.equal(together[row : row + 1], greedy(model, ids[row : row + 1], cache.copy()))


def test_a_cache_without_its_attention_fails_loudly():
    model = tiny_model("llama")
    cache = lissom.compact(model, DOCUMENT, ratio=0.3)
    uninstall(model)
    with pytest.raises(UserError, match="cannot read it"):
        model(QUESTION, past_key_values=cache)


@pytest.mark.parametrize(
    "ids,options,words",
    [
        (DOCUMENT[:, :0], {}, "empty"),
        (random_ids(600), {}, "at most 512"),
        (DOCUMENT, {"ratio": 0.0}, "not in"),
        (DOCUMENT, {"ratio": 1.5}, "not in"),
        (DOCUMENT, {"ratio": float("nan")}, "not in"),
        (DOCUMENT, {"select": "best"}, "expected one of"),
        (DOCUMENT, {"queries": "repat"}, "expected one of"),
        (DOCUMENT, {"reduce": "mx"}, "expected one of"),
        (DOCUMENT, {"prior": "orig"}, "expected one of"),
        (DOCUMENT, {"budgets": "fair"}, "expected one of"),
        (DOCUMENT, {"pool": 4}, "odd"),
        (DOCUMENT, {"beta_max": float("nan")}, "finite"),
        (DOCUMENT, {"ratio": "0.1"}, "not in"),
        (DOCUMENT, {"ratio": True}, "not in"),
        (DOCUMENT, {"sinks": 2.5}, "whole number"),
        (DOCUMENT + 1000, {}, "no tokens of this model"),
        ({"input_ids": DOCUMENT, "attention_mask": DOCUMENT[:, :5]}, {}, "not of the shape"),
        (DOCUMENT, {"queries": "self-study"}, "tokenizer"),
    ],
)
def test_bad_input_is_one_sentence(ids, options, words):
    with pytest.raises(UserError, match=words):
        lissom.compact(tiny_model("llama"), ids, **options)


def test_lists_of_a_tokenizer_and_a_single_row_are_taken():
    model = tiny_model("llama")
    wanted = lissom.compact(model, DOCUMENT, ratio=0.3)
    plain = {"input_ids": DOCUMENT[0].tolist(), "attention_mask": [1] * 100}
    got = lissom.compact(model, plain, ratio=0.3)
    assert all(a.store.values.equal(b.store.values) for a, b in zip(got.layers, wanted.layers, strict=True))


@pytest.mark.parametrize("tokens", [1, 3, 6])
@pytest.mark.parametrize("budgets", ["uniform", "global"])
def test_documents_shorter_than_the_sinks(tokens, budgets):
    model, ids = tiny_model("llama"), random_ids(tokens)
    cache = lissom.compact(model, ids, ratio=0.1, budgets=budgets)
    assert cache.get_seq_length() == tokens and cache.stored_entries <= 6 * tokens
    assert model(QUESTION, past_key_values=cache).logits.isfinite().all()


def test_a_cache_is_read_by_the_same_model_in_another_dtype(tmp_path):
    model = tiny_model("llama")
    file.save(lissom.compact(model, DOCUMENT, ratio=0.3), tmp_path / "c.safetensors", model)
    halved = tiny_model("llama").to(torch.bfloat16)
    cache, _, _ = file.load(tmp_path / "c.safetensors", halved)
    assert cache.layers[0].store.keys.dtype == torch.bfloat16
    assert halved(QUESTION, past_key_values=cache).logits.isfinite().all()


def test_a_layer_of_another_kind_is_rolled_back_and_not_saved(tmp_path):
    """Lfm2 has convolutions beside its attention: their state is written in place."""
    torch.manual_seed(0)
    config = Lfm2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, layer_types=["conv", "full_attention"] * 2, block_multiple_of=16, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        wanted = model(BOTH).logits[:, -7:]
        cache = lissom.compact(model, DOCUMENT, ratio=1.0)  # with a repeat pass that must leave no trace
        torch.testing.assert_close(model(QUESTION, past_key_values=cache.copy()).logits, wanted, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="cannot be saved"):
        file.save(cache, tmp_path / "c.safetensors", model)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: lissom.compact(model, DOCUMENT),
        lambda model: lissom.AttentionMatching()(model).__enter__(),
        lambda model: lissom.KVBudget("1MB")(model).__enter__(),
    ],
    ids=["compact", "method", "budget"],
)
def test_a_model_whose_layers_all_slide_is_refused(use):
    config = MistralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(UserError, match="nothing to compact"):
        use(AutoModelForCausalLM.from_config(config).eval())


def test_a_model_without_attention_is_refused():
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128, state_size=4)
    with pytest.raises(UserError, match="no attention layers"):
        lissom.compact(AutoModelForCausalLM.from_config(config).eval(), DOCUMENT)


def test_a_text_instead_of_ids_is_refused():
    with pytest.raises(UserError, match="document_ids"):
        lissom.compact(tiny_model("llama"), "A text.")


def test_two_methods_on_one_prompt_each_get_their_queries():
    model = tiny_model("llama")
    first, second = lissom.AttentionMatching(ratio=0.5, queries="context"), lissom.Eviction(ratio=0.5, score="h2o")
    with first(model), second(model):
        cache = DynamicCache(config=model.config)
        model(DOCUMENT, past_key_values=cache, use_cache=True)
    assert all(layer.store.stored_entries == 2 * 25 for layer in cache.layers)


def test_unsupported_attention_is_refused():
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16),
        attn_implementation="flex_attention",
    )
    with pytest.raises(UserError, match="flex_attention"):
        lissom.compact(model, torch.ones(1, 4, dtype=torch.long))
