"""`FlashPrefill` in running models."""

from __future__ import annotations

import copy
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, DECODERS, ByteTokenizer, close, random_ids, tiny_model
from transformers import AutoModel, BertConfig, DynamicCache

from lissom import AttentionMatching, Eviction, FlashPrefill, KVBudget, NativeDecode, compact, sparse_prefill
from lissom.attention.flash_prefill import apply, controls, crossover
from lissom.attention.flash_prefill.apply import Running
from lissom.attention.flash_prefill.calibrate import GRID, Measuring, chosen
from lissom.attention.flash_prefill.report import LayerReport
from lissom.decode import passes
from lissom.errors import UserError
from lissom.kernels.blocks import Rules
from lissom.models.attention import install
from lissom.models.attention.prompts import Stretch, _say, mask_through
from lissom.models.calibration import builtin_text, calibration_windows
from lissom.models.method import SearchContext
from lissom.recipes import Recipe

EXACT = {"min_tokens": 0, "precision": "exact"}
SPARSE = {**EXACT, "alpha": 2.0, "sink": 1, "window": 1, "last": 0}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_alpha_zero_is_the_plain_model(architecture, implementation):
    """With padding on the left; leaving the block restores the model."""
    model, ids = tiny_model(architecture, implementation), random_ids(300, 2)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    wanted = model(ids, attention_mask=mask).logits[mask.bool()]
    with FlashPrefill(alpha=0.0, **EXACT)(model) as report:
        close(model(ids, attention_mask=mask).logits[mask.bool()], wanted)
    assert report.density == 1.0 and report.layers
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], wanted)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_sparse_is_sparse(architecture):
    model, ids = tiny_model(architecture), random_ids(500)
    wanted = model(ids).logits
    with FlashPrefill(**SPARSE, estimate=True)(model) as report:
        got = model(ids).logits
    assert report.density == pytest.approx(7 / 10)  # the third and the fourth tile leave out what is between
    assert 0 < report.dropped < 1 and report.seconds > 0
    close(got[:, :256], wanted[:, :256])
    assert float((got[:, 384:] - wanted[:, 384:]).abs().max()) > 0.01


@torch.no_grad()
def test_blocks_that_the_kernel_lacks():
    """They are computed in PyTorch, where the time of choosing is not measured."""
    model, ids = tiny_model("llama"), random_ids(500)
    with FlashPrefill(**SPARSE | {"block_size": 32})(model) as report:
        model(ids)
    assert 0 < report.density < 1 and report.choosing != report.choosing


@torch.no_grad()
def test_rows_of_a_batch_are_as_alone():
    model, ids = tiny_model("llama"), random_ids(450, 2)
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    with FlashPrefill(**SPARSE)(model):
        batch = model(ids, attention_mask=mask).logits
        positions = torch.arange(413)[None]
        alone = model(ids[1:, 37:], position_ids=positions).logits
        placed = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert batch.shape == placed.shape
    close(placed[1:, 37:], alone)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True},
                                     {"prefill_chunk_size": 150}, {"num_beams": 2}])  # fmt: skip
def test_generate(options):
    model, ids = tiny_model("llama"), random_ids(300)
    settings = {"max_new_tokens": 6, "do_sample": False} | options
    wanted = model.generate(ids, **settings)
    with FlashPrefill(alpha=0.0, **EXACT)(model) as report:
        assert torch.equal(model.generate(ids, **settings), wanted)
    assert report.layers


@torch.no_grad()
def test_what_is_loaded_with_the_name():
    model = tiny_model("llama", "lissom_sparse_prefill")
    ids = random_ids(200)
    close(model(ids).logits, tiny_model("llama")(ids).logits)


@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"corrected": True}, {"last": 1}])
@pytest.mark.parametrize("architecture", [name for name in DECODERS if name != "mistral"])  # which is all windows
@torch.no_grad()
def test_native_passes_are_sparse_alike(architecture, settings, monkeypatch):
    """In stretches of whole tiles logits, blocks and estimates are those of transformers' passes."""
    monkeypatch.setattr(passes, "_CHUNK", 512)  # of both rows
    model, ids = tiny_model(architecture), random_ids(500, 2)
    method = FlashPrefill(**SPARSE | {"alpha": 0.97, "block_size": 64} | settings, estimate=True)
    with method(model) as wanted:
        logits = model(ids).logits
    with method(model) as got, NativeDecode(kv="fp32")(model):
        close(model(ids).logits, logits)
    assert got.layers.keys() == wanted.layers.keys() and wanted.density < 1
    assert all(got.layer(i).blocks == wanted.layer(i).blocks for i in wanted.layers)
    assert got.density == wanted.density and 0 < got.choosing < got.seconds
    assert got.dropped == pytest.approx(wanted.dropped, rel=1e-3)


@torch.no_grad()
def test_native_passes_with_padding(monkeypatch):
    """On the left, longer than the first stretch."""
    monkeypatch.setattr(passes, "_CHUNK", 330)
    model, ids = tiny_model("llama"), random_ids(500, 2)
    mask = torch.ones_like(ids)
    mask[1, :201] = 0
    with FlashPrefill(**SPARSE)(model):
        wanted = model(ids, attention_mask=mask).logits[mask.bool()]
    with FlashPrefill(**SPARSE, estimate=True)(model) as report, NativeDecode(kv="fp32")(model):
        close(model(ids, attention_mask=mask).logits[mask.bool()], wanted)
    assert 0 < report.density < 1 and 0 < report.dropped < 1


@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_native_passes_are_cut_between_tiles(shared):
    """Behind a prefix, and with padding, that no tile ends at: what is chosen, and the logits, are the same."""
    model, ids = tiny_model("llama", max_position_embeddings=2048), random_ids(900, 2)
    method = FlashPrefill(**SPARSE | {"alpha": 0.8, "sink": 0, "shared": shared})

    def read(rows, prefix, padding):
        mask = torch.ones_like(ids[:rows])
        mask[-1, :padding] = 0
        cache = DynamicCache(config=model.config)
        if prefix:
            model(ids[:rows, :prefix], attention_mask=mask[:, :prefix], past_key_values=cache)
        with method(model) as report:
            logits = model(ids[:rows, prefix:], attention_mask=mask, past_key_values=cache).logits
        return logits[-1, max(0, padding - prefix) :], report.layers[0].blocks, report.layers[0].causal

    for given in ((1, 1, 0), (1, 200, 0), (2, 0, 128), (2, 0, 100), (2, 30, 250)):
        wanted = read(*given)
        with NativeDecode(kv="fp32")(model):
            got = read(*given)
        close(got[0], wanted[0])
        assert got[1:] == wanted[1:]


@torch.no_grad()
def test_native_passes_of_a_model_that_was_loaded_with_the_name(monkeypatch):
    seen = []
    monkeypatch.setattr(Running, "natively", lambda *given: seen.append(given))
    model = tiny_model("llama", "lissom_sparse_prefill")
    with NativeDecode()(model):
        model(random_ids(20))
    assert len(seen) == 1


@torch.no_grad()
def test_controls_are_for_transformers_passes(caplog):
    model = tiny_model("llama")
    with FlashPrefill(**SPARSE | {"selection": "top-k", "count": 1})(model) as report, NativeDecode()(model):
        model(random_ids(500))
    assert 0.7 < report.density < 1 and "selection='top-k'" in caplog.text


@torch.no_grad()
def test_settings_by_layer_and_head():
    model, ids = tiny_model("llama"), random_ids(500)
    alphas = [[2.0, 0.0, 2.0, 0.0], [0.0] * 4, [2.0] * 4]
    with FlashPrefill(**SPARSE | {"alpha": alphas})(model) as report:
        model(ids)
    assert [report.layer(i).density for i in range(3)] == pytest.approx([0.85, 1.0, 0.7])
    with FlashPrefill(**SPARSE, dense_layers=2)(model) as report:
        model(ids)
    assert [report.layer(i).density for i in range(3)] == pytest.approx([1.0, 1.0, 0.7])
    with pytest.raises(UserError, match="3 layers of 4"), FlashPrefill(alpha=[0.1, 0.2])(model):
        pass


@torch.no_grad()
def test_short_prompts_stay_dense():
    model = tiny_model("llama")
    with FlashPrefill()(model) as report:
        model(random_ids(300))
    assert not report.layers


@torch.no_grad()
def test_the_shortest_sparse_prompt():
    model = tiny_model("llama")
    for tokens, sparse in ((399, False), (400, True)):
        for block in (nullcontext, lambda: NativeDecode(kv="fp32")(model)):
            with FlashPrefill(**SPARSE | {"min_tokens": 400})(model) as report, block():
                model(random_ids(tokens))
            assert bool(report.layers) == sparse


def test_reports_leave_out_padding():
    """What is left out is the mean over real queries, and blocks are those of the real tokens."""
    report, rules = LayerReport(), Rules(last=0)
    selected, dropped = torch.ones(2, 2, 4, 4, dtype=torch.bool), torch.rand(2, 2, 400)
    report.add(rules, 400, 500, [0, 200], 1, selected, dropped)
    report.add(rules, 400, 500, [500, 0], 1, selected, dropped)
    real = [dropped[0], dropped[1, :, 100:], dropped[1]]  # of the second row 300 tokens are
    assert report.dropped == pytest.approx(float(torch.cat([part.flatten() for part in real]).mean()))
    assert report.queries == 2 * (400 + 300 + 400) and report.causal == 2 * (10 + 6 + 10)


@torch.no_grad()
def test_what_takes_the_place_of_a_mask():
    """What a query sees is what it would by a mask; padding sees itself, so that no softmax is empty."""
    stretch = Stretch([0, 3], 7)
    seen = stretch.visible(4, 9, torch.device("cpu"))
    for row, pad in enumerate((0, 3)):
        for token in range(4):
            place = 3 + token
            assert seen[row, 0, token].tolist() == [k <= place and (k >= pad or k == place) for k in range(9)]
    assert bool(Stretch([5], 6).visible(6, 6, torch.device("cpu")).any(-1).all())


@pytest.mark.parametrize(
    "others",
    [{"kv_offset": 1}, {"allow_is_causal_skip": False}, {"local_size": 4}, {"q_length": 1}, {"kv_length": 19},
     {"mask_function": lambda *places: True}, {"attention_mask": torch.tensor([[1] * 19 + [0]])}],
)  # fmt: skip
def test_masks_that_are_others(others):
    """Each is left to what makes the model's own masks."""
    plain = {"batch_size": 1, "q_length": 20, "kv_length": 20}
    assert Stretch.has(mask_through(lambda **given: None)(**plain))
    assert mask_through(lambda **given: given)(**plain | others).items() >= others.items()


@torch.no_grad()
def test_why_nothing_was_sparse_is_told():
    """Also where it was logged before, for another block."""
    model, mistral = tiny_model("llama"), tiny_model("mistral")
    for block in (nullcontext, lambda m: NativeDecode(kv="fp32")(m)):
        for _ in range(2):
            with FlashPrefill()(model) as report, block(model):
                model(random_ids(300))
            assert report.summary() == "No prompt was read sparsely: prompts of fewer than 1152 tokens."
            with FlashPrefill(**SPARSE)(mistral) as report, block(mistral):
                mistral(random_ids(300))
            assert report.summary() == "No prompt was read sparsely: in layers with a sliding window."
    with torch.enable_grad(), FlashPrefill(**SPARSE)(model) as report:
        model(random_ids(300))
    assert report.summary() == "No prompt was read sparsely: gradients are wanted."
    gemma = tiny_model("gemma3")
    with FlashPrefill(**SPARSE)(gemma) as report:
        gemma(random_ids(500))
    assert "met 70.0% of its blocks" in report.summary() and report.summary().endswith("with a sliding window.")


@torch.no_grad()
@torch.no_grad()
def test_reports_name_layers_and_calls_that_are_dense():
    model, ids = tiny_model("llama"), random_ids(400)
    with FlashPrefill(**SPARSE, dense_layers=1)(model) as report:
        cache = DynamicCache(config=model.config)
        model(ids[:, :300], past_key_values=cache)
        model(ids[:, 300:340], past_key_values=cache)
        model(ids[:, 340:341], past_key_values=cache)
    assert list(report.dense) == [
        "in the first 1 layers, as `dense_layers` says",
        "calls of fewer than 128 tokens behind others",
    ]


def test_stretches_end_between_tiles_that_are_no_power_of_two():
    """Three heads that share a list have tiles of 42 positions."""
    running = Running(FlashPrefill(shared=True))
    stretches = apply.NativeStretches(running, torch.full((2, 3), 0.1), 1, [0], [True, True])
    assert stretches.edges(400, 400, 100) == [0, 84, 168, 252, 336, 400]


@torch.no_grad()
@pytest.mark.parametrize("tokens", [127, 128])
def test_calls_of_a_whole_tile_are_sparse(tokens):
    model, ids = tiny_model("llama"), random_ids(300 + tokens)
    with FlashPrefill(**SPARSE)(model) as report:
        cache = DynamicCache(config=model.config)
        model(ids[:, :300], past_key_values=cache)
        before = report.layers[0].causal
        model(ids[:, 300:], past_key_values=cache)
    assert (report.layers[0].causal > before) == (tokens == 128)


def test_the_crossover_is_measured_once_on_a_machine(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_measured", lambda *facts: measured.append(facts) or 2304)
    facts = (3, 1, 64), torch.float32, "cpu", FlashPrefill().rules(), 0.1, "bf16", False
    for _ in range(2):
        crossover.crossover.cache_clear()  # as another process
        assert crossover.crossover(*facts) == 2304
    assert len(measured) == 1
    (tmp_path / "crossover").rename(tmp_path / "moved")
    (tmp_path / "crossover").write_text("no folder")
    crossover.crossover.cache_clear()
    assert crossover.crossover(*facts) == 2304 and len(measured) == 2
    crossover.crossover.cache_clear()


def test_a_hopeless_crossover_is_not_looked_for_to_the_end(monkeypatch):
    clock, tried = [0.0], []

    def seconds(work, like):
        tried.append(like.shape[2])
        sparse = work.func is not torch.nn.functional.scaled_dot_product_attention
        clock[0] += 5.0 if sparse else 0.5
        return 5.0 if sparse else 0.5

    monkeypatch.setattr(crossover, "_seconds", seconds)
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: clock[0])
    rules = FlashPrefill().rules()
    found = crossover._measured((3, 1, 64), torch.float32, "cpu", rules, 0.1, "bf16", False)
    assert set(tried) == {crossover.first_sparse(rules)}
    assert found == 16 * crossover.first_sparse(rules)  # ten times as slow: four doublings


def test_what_is_not_causal_is_dense_and_says_so():
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = AutoModel.from_config(BertConfig(**shape, vocab_size=300)).eval()
    wanted = model(random_ids(300)).last_hidden_state
    with FlashPrefill(**SPARSE)(model) as report:
        close(model(random_ids(300)).last_hidden_state, wanted)
    assert report.summary() == "No prompt was read sparsely: BertSelfAttention is not causal."


@pytest.mark.parametrize("foreign", [3, None, torch.nn.Linear(2, 2)])
def test_foreign_models(foreign):
    with pytest.raises(UserError, match="Expected a model"), FlashPrefill()(foreign):
        pass


def test_more_dense_layers_than_there_are():
    with pytest.raises(UserError, match="the model has 3 layers"), FlashPrefill(dense_layers=4)(tiny_model("llama")):
        pass


def test_training_is_dense(caplog):
    _say.cache_clear()
    model = tiny_model("llama").train()
    with FlashPrefill(**SPARSE)(model) as report:
        for _ in range(2):
            model(random_ids(300), labels=random_ids(300)).loss.backward()
    assert not report.layers and [r.message for r in caplog.records if "gradients" in r.message].__len__() == 1


@pytest.mark.parametrize("inner", [lambda: NativeDecode(kv="fp32"), lambda: KVBudget("1MB", "streaming-llm"),
                                   lambda: AttentionMatching(0.5, queries="context")])  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_composes(inner, first):
    """Prompts are sparse whichever block is the inner one."""
    model, ids = tiny_model("llama"), random_ids(400)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with inner()(model):
        wanted = model.generate(ids, **settings)
    blocks = [FlashPrefill(alpha=0.0, **EXACT), inner()]
    one, other = blocks if first else blocks[::-1]
    with one(model) as a, other(model) as b:
        assert torch.equal(model.generate(ids, **settings), wanted)
    assert (a if first else b).layers
    assert model.config._attn_implementation == "sdpa"


def test_composes_with_packed_weights_and_compaction():
    """One recipe: low-bit weights, native passes, sparse prompts, a compacted cache."""
    steps = [{"quantize": {"method": "rtn"}}, "native-decode", {"flash-prefill": {"alpha": 0.0, "min_tokens": 0}},
             {"attention-matching": {"ratio": 0.5, "queries": "context"}}]  # fmt: skip
    recipe = Recipe(methods=steps)
    quantize, native, sparse, compact = recipe.build()
    model, ids = quantize.convert(tiny_model("llama")), random_ids(400)
    settings = {"max_new_tokens": 4, "do_sample": False}
    with native(model), compact(model):
        wanted = model.generate(ids, **settings)
    with recipe.running(model):
        assert torch.equal(model.generate(ids, **settings), wanted)
    with native(model), sparse(model) as report, compact(model):
        model.generate(ids, **settings)
    assert report.layers


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -1.0}, {"alpha": float("nan")}, {"alpha": []}, {"selection": "best"}, {"block_size": 100}, {"sink": -1},
     {"min_tokens": -1}, {"alpha": [[0.1], [0.1, 0.2]]}, {"alpha": "high"}, {"precision": "half"},
     {"share": 0.0}, {"count": 0}, {"window": "a"}, {"sink": 1.5}, {"min_tokens": "some"}, {"last": True},
     {"alpha": True}, {"shared": "no"}, {"seed": None}],
)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(UserError):
        FlashPrefill(**settings)


@pytest.mark.parametrize("settings", [{}, {"shared": True}, {"selection": "row-normalised"}])
def test_calibration_keeps_to_its_budget(settings):
    """On the text itself: each head leaves out no more, and a larger budget gives no smaller threshold."""
    model, tokenizer = tiny_model("llama"), ByteTokenizer()
    method = FlashPrefill(**EXACT, block_size=64, sink=1, window=1, last=0, estimate=True, **settings)
    own = {"tokens": 500, "length": 500}
    strict, loose = (method.calibrated(model, tokenizer, budget, **own) for budget in (0.02, 0.2))
    assert torch.tensor(strict.alpha).shape == (3, 4)
    assert bool((torch.tensor(strict.alpha) <= torch.tensor(loose.alpha)).all()) and strict.alpha != loose.alpha
    ids = calibration_windows(tokenizer, None, 500, 500)
    parts = []

    def keeping(query, key, value, **options):
        parts.append([sparse_prefill(query, key, value, **options | {"alpha": a}).lse for a in (0.0, options["alpha"])])
        return sparse_prefill(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), loose(model):
        patch.setattr(apply, "sparse_prefill", keeping)
        model(ids)
    # The first layer reads the same as in the calibration; those above it read what came of sparse attention.
    dense, sparse = parts[0]
    assert bool(((1 - (sparse - dense).exp()).mean((0, 2)) <= 0.2).all())


def test_calibration_is_of_the_mean_over_prompts(tmp_path):
    """The same text twice gives what it gives once."""
    prompt, model = builtin_text()[:500], tiny_model("llama")
    (tmp_path / "once").write_text(prompt)
    (tmp_path / "twice").write_text(2 * prompt)
    method, found = FlashPrefill(**EXACT, block_size=64, sink=1, window=1, last=0), []
    for name, tokens in (("once", 500), ("twice", 1000)):
        own = {"tokens": tokens, "length": 500, "text": tmp_path / name}
        found.append(method.calibrated(model, ByteTokenizer(), 0.1, **own).alpha)
    assert found[0] == found[1] and 0 < torch.tensor(found[0]).mean() < 1
    # The means that stand for what is left out do not count as met.
    assert not Measuring(replace(method, corrected=True)).rules.corrected


def test_calibration_by_layer():
    found = FlashPrefill(**EXACT, block_size=64, last=0).calibrated(
        tiny_model("gemma3"), ByteTokenizer(), 0.1, each="layer", tokens=500, length=500
    )
    assert len(found.alpha) == 4 and all(isinstance(alpha, float) for alpha in found.alpha)


def test_calibration_leaves_layers_dense_that_are_in_any_case():
    found = FlashPrefill(**EXACT, block_size=64, last=0).calibrated(
        tiny_model("gemma3"), ByteTokenizer(), 0.5, tokens=500, length=500
    )
    assert [max(alphas) > 0 for alphas in found.alpha] == [False, True] * 2  # every other one has a window


@torch.no_grad()
def test_copies_and_models_that_read_compacted_caches():
    """A copy that is made in a block is in none; what is installed already gives way."""
    model, ids = tiny_model("llama"), random_ids(500)
    dense = model(ids).logits
    with FlashPrefill(**SPARSE)(model):
        sparse, other = model(ids).logits, copy.deepcopy(model)
        close(other(ids).logits, dense)
        with FlashPrefill(**SPARSE)(other):
            close(other(ids).logits, sparse)
        close(other(ids).logits, dense)
    install(model)
    for one in (model, copy.deepcopy(model)):
        name = one.config._attn_implementation
        with FlashPrefill(**SPARSE)(one) as report:
            close(one(ids).logits, sparse)
        assert report.layers and one.config._attn_implementation == name
        close(one(ids).logits, dense)


@torch.no_grad()
def test_few_tokens_behind_a_prompt_attend_to_everything():
    model, ids = tiny_model("llama"), random_ids(500)
    for block in (nullcontext, lambda: NativeDecode(kv="fp32")(model)):
        with FlashPrefill(alpha=0.0, **EXACT)(model), block():
            wanted = model(ids[:, 480:], past_key_values=model(ids[:, :480]).past_key_values).logits
        with FlashPrefill(**EXACT)(model) as report, block():
            cache = model(ids[:, :480]).past_key_values
            before = report.layer(0).blocks
            assert before and model(ids[:, 480:], past_key_values=cache).logits.shape == wanted.shape
        assert report.layer(0).blocks == before


@torch.no_grad()
def test_weights_of_the_attention_are_given(caplog):
    _say.cache_clear()
    model, ids = tiny_model("llama", "eager"), random_ids(300)
    wanted = model(ids, output_attentions=True).attentions
    with FlashPrefill(**SPARSE)(model) as report:
        got = model(ids, output_attentions=True).attentions
    assert len(got) == 3 and not report.layers and "output_attentions" in caplog.text
    close(got[2], wanted[2])


@torch.no_grad()
def test_what_else_is_in_an_attention_is_not_left_out(caplog):
    """Tensors that are not known, a bias by position, say: dense, and a compacted cache refuses them."""
    _say.cache_clear()
    model, ids = tiny_model("llama"), random_ids(300)
    with FlashPrefill(**SPARSE)(model) as report:
        model(ids, position_bias=torch.zeros(1, 4, 300, 300))
    assert not report.layers and "LlamaAttention has position_bias" in caplog.text
    cache = compact(model, ids, Eviction(0.5, score="streaming-llm"))
    with pytest.raises(UserError, match="position_bias"):
        model(ids[:, :1], past_key_values=cache, position_bias=torch.zeros(1, 4, 1, 301))


def test_nothing_to_calibrate():
    with pytest.raises(UserError, match="no thresholds"):
        FlashPrefill(block_size=64, last=0).calibrated(tiny_model("mistral"), ByteTokenizer(), tokens=500, length=500)


def test_candidates_begin_where_something_can_be_left_out():
    assert not FlashPrefill.candidates(SearchContext(1024, 1)) and FlashPrefill.candidates(SearchContext(1152, 1))
    labels = {str(FlashPrefill(alpha=alpha)) for alpha in (0.1, [0.1, 0.2], [0.1, 0.3], [[0.1], [0.2]])}
    assert len(labels) == 4


def test_thresholds_are_the_largest_within_the_budget():
    dropped = torch.linspace(0.9, 0, len(GRID))[:, None].repeat(1, 3)
    dropped[3, 1], dropped[:, 2] = 0.99, 0.0
    dropped[5, 1] = 0.0  # less than for the smaller threshold before it
    assert chosen(dropped, 0.9) == [GRID[0], GRID[4], GRID[0]]
    assert chosen(dropped[:, :2], 0.0) == [0.0, 0.0]


@pytest.mark.parametrize(
    "settings, given, words",
    [({}, {"budget": 0.0}, "budget"), ({}, {"length": 400}, "fewer than 1152"), ({}, {"length": 0}, "length=0"),
     ({}, {"each": "token"}, "each"), ({"selection": "top-k"}, {}, "threshold"),
     ({"block_size": 64, "last": 0}, {"tokens": 500}, "tokens=500"),
     ({"block_size": 64, "last": 0}, {"text": "no/such/file"}, "cannot be read")],
)  # fmt: skip
def test_calibrations_that_make_no_sense(settings, given, words):
    with pytest.raises(UserError, match=words):
        FlashPrefill(**settings).calibrated(tiny_model("llama"), ByteTokenizer(), **given)


@torch.no_grad()
def test_compiled():
    """A compiled model reads prompts sparsely, too: the compiler leaves the graph for what depends on the mask."""
    model, ids = tiny_model("llama"), random_ids(500)
    dense = model(ids).logits
    compiled = torch.compile(model, backend="aot_eager")
    with FlashPrefill(**SPARSE)(model) as report:
        wanted = model(ids).logits
        mask = torch.ones_like(ids)
        before = report.layer(2).blocks
        close(compiled(ids, attention_mask=mask, use_cache=False).logits, wanted)
        close(compiled(ids[:, :400], attention_mask=mask[:, :400], use_cache=False).logits, wanted[:, :400])
        assert report.layer(2).blocks > before
    close(compiled(ids, attention_mask=mask, use_cache=False).logits, dense)


@torch.no_grad()
def test_masks_that_are_more(caplog):
    """Padding on the right, or within, and masks of four dimensions go the dense way, which is said once."""
    _say.cache_clear()
    model, ids = tiny_model("llama"), random_ids(500, 2)
    mask = torch.ones_like(ids)
    mask[1, 450:], mask[0, 30:40] = 0, 0
    causal = torch.ones(500, 500).tril().bool()
    whole = (causal & mask.bool()[:, None, None]) | torch.eye(500).bool()
    wanted = model(ids, attention_mask=mask).logits[mask.bool()]
    for native in (False, True):
        _say.cache_clear()
        with ExitStack() as stack:
            report = stack.enter_context(FlashPrefill(**SPARSE)(model))
            if native:
                stack.enter_context(NativeDecode(kv="fp32")(model))
            caplog.clear()
            for given in (mask, mask, mask if native else whole):
                close(model(ids, attention_mask=given).logits[mask.bool()], wanted)
        assert not report.layers
        said = [record.message for record in caplog.records if record.name.startswith("lissom.models.attention")]
        assert len(said) == 1 and said[0].startswith("Prompts are read with dense attention")


@torch.no_grad()
def test_padding_that_is_longer_than_what_is_read():
    model, ids = tiny_model("llama"), random_ids(300, 2)
    mask = torch.ones_like(ids)
    mask[1, :200] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": 150}
    wanted = model.generate(ids, **settings)
    for method in (FlashPrefill(alpha=0.0, **EXACT), FlashPrefill(alpha=0.0, **EXACT, selection="top-k", count=1)):
        with method(model) as report:
            assert torch.equal(model.generate(ids, **settings), wanted)
        assert report.density == 1.0


@torch.no_grad()
def test_controls_keep_to_thresholds():
    """Layers and heads of threshold 0 are dense, and random blocks differ from layer to layer."""
    model, ids = tiny_model("llama"), random_ids(500)
    for name in ("random", "top-k", "top-p", "flexprefill", "xattention"):
        with FlashPrefill(**SPARSE | {"block_size": 64, "alpha": [0.0, 2.0, 2.0]}, selection=name, share=0.3, count=1)(
            model
        ) as report:
            model(ids)
        assert report.layer(0).density == 1.0 and report.layer(1).density < 1, name
    seen = []
    with pytest.MonkeyPatch.context() as patch, FlashPrefill(**SPARSE | {"alpha": 0.9}, selection="random")(model):
        patch.setattr(controls.selection, "at_random", lambda like, layout, seed: seen.append(seed) or like)
        model(ids)
    assert len(set(seen)) == 3


@pytest.mark.parametrize(
    "first",
    ["import lissom", "import transformers.modeling_utils, lissom", "from lissom import load", "import lissom.models",
     "from lissom import Quantize", "import lissom.cli", "from lissom import FlashPrefill"],
)  # fmt: skip
def test_the_name_is_known_after_import(first):
    """Whatever is imported first."""
    program = f"""
{first}
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
shape = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), attn_implementation="lissom_sparse_prefill")
print(model(torch.ones(1, 20, dtype=torch.long)).logits.shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "[1, 20, 64]" in done.stdout, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_on_a_gpu(architecture):
    """Dense at 0, with padding on the left; sparse above, as on the CPU."""
    model, ids = tiny_model(architecture), random_ids(500, 2)
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    settings = {"min_tokens": 0, "precision": "exact", "sink": 1, "window": 1, "last": 0}
    for alpha in (0.0, 2.0):
        with FlashPrefill(alpha=alpha, **settings)(model):
            wanted = model(ids, attention_mask=mask).logits
        on_gpu = tiny_model(architecture).cuda()
        with FlashPrefill(alpha=alpha, **settings)(on_gpu) as report:
            got = on_gpu(ids.cuda(), attention_mask=mask.cuda()).logits
            tokens = on_gpu.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=4, do_sample=False)
        wanted = wanted[mask.bool()]
        assert float((got[mask.bool().cuda()].cpu() - wanted).norm() / wanted.norm()) < 1e-4
        assert report.density == 1.0 if not alpha else report.density < 1.0
        assert tokens.shape == (2, 504)
