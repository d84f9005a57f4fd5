"""The study of the quantiser: turned weights, llama.cpp's arms, resuming, verdicts, loading."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import torch
from gguf_files import Kind
from tiny import ByteTokenizer, close, random_ids, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

from lissom import Quantize
from lissom.errors import UserError
from lissom.evals import loading
from lissom.evals.checks import quantize as study
from lissom.evals.peers import process
from lissom.evals.peers.process import Failed, Worker
from lissom.evals.stats import Interval, verdict
from lissom.kernels.packed_layers import PackedLinear
from lissom.models import calibration
from lissom.models.gguf import load_packed
from lissom.models.linear import linear_layers
from lissom.report.checks import check_of
from lissom.report.checks import quantize as report

HAS_LLAMA_CPP = os.environ.get("LISSOM_LLAMA_CPP_PYTHON") or importlib.util.find_spec("llama_cpp")
needs_llama_cpp = pytest.mark.skipif(
    not HAS_LLAMA_CPP, reason="needs llama-cpp-python, here or where LISSOM_LLAMA_CPP_PYTHON points"
)
TINY = study.Size(
    3, 0, (study.DENSE, study.FINE, "4-bit symmetric gptq", study.Q4_0, study.MIXED), 32, calibration_tokens=1024
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer, whose matrices fill the largest blocks."""
    path = tmp_path_factory.mktemp("quantize") / "model.gguf"
    gguf_files.write(path, gguf_files.model_of("llama"), Kind.F32, "llama")
    return gguf_files.model_of("llama"), load_packed(path)[1]


@pytest.fixture
def short_text(monkeypatch):
    """Texts that are soon tokenized, to calibrate on and to measure on."""
    monkeypatch.setattr(calibration, "builtin_text", lambda: "in the 12 the 3 the in 45 " * 400)
    monkeypatch.setattr(study, "passages", lambda: [("a", "the 12 in the 1 the 2 the " * 99)] * 5)


@pytest.fixture
def copying(tmp_path, monkeypatch):
    """A llama.cpp that leaves every matrix as it is."""
    shutil.copy(Path(process.__file__).parent / "worker.py", tmp_path)
    (tmp_path / "runtimes").mkdir()
    code = "import shutil\ndef prepare(settings):\n    shutil.copy(settings['gguf'], settings['quantised'])\n"
    (tmp_path / "runtimes" / "llama_cpp.py").write_text(code)
    monkeypatch.setattr(process, "_HERE", tmp_path)
    monkeypatch.setenv("LISSOM_LLAMA_CPP_PYTHON", sys.executable)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen2", "phi3"])
@pytest.mark.parametrize("kind", study.KINDS)
def test_turned_weights_compute_the_same(architecture, kind):
    model, ids = tiny_model(architecture), random_ids(20)
    wanted = model(ids).logits.detach()
    before = {name: module.weight.detach().clone() for layer in linear_layers(model) for name, module in layer.items()}
    turns = study.turn_matrices(model, kind, 0)
    assert turns.keys() == before.keys()
    for name, weight in before.items():
        now = model.get_submodule(name).weight.detach()
        assert float((now - weight).norm() / weight.norm()) > 0.5
        torch.testing.assert_close(now @ now.T, weight @ weight.T)  # rows keep lengths and angles
    assert not torch.allclose(model(ids).logits, wanted, atol=0.1)
    study.turn_inputs(model, turns)
    close(model(ids).logits, wanted)


def test_seeds_turn_differently():
    one, other = (study.turn_matrices(tiny_model("llama"), "permuted", seed) for seed in (0, 1))
    again = study.turn_matrices(tiny_model("llama"), "permuted", 0)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_layers_that_cannot_be_turned():
    with pytest.raises(UserError, match=r"Conv1D.*nn\.Linear"):
        study.turn_matrices(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99)), "rotated", 0)


@pytest.mark.parametrize("kind", study.KINDS)
def test_the_way_through_a_file_changes_nothing(model, copying, short_text, kind):
    """What llama.cpp makes of the turned matrices lands in the right places."""
    dense, tokenizer = model
    ids = torch.randint(0, dense.config.vocab_size, (1, 24), generator=torch.Generator().manual_seed(0))
    found, bits = study.quantized(dense, tokenizer, kind, 0, study.LlamaCpp("Q4_0", 1024))
    assert bits == 32
    assert sum(isinstance(module, PackedLinear) for module in found.modules()) == 2 * 7 + 1
    with torch.no_grad():
        close(found(ids).logits, dense(ids).logits)


def test_importance_is_that_of_the_turned_inputs(model, short_text):
    dense, tokenizer = model
    seen = {}
    for kind in study.KINDS:
        turned = gguf_files.model_of("llama")
        turns = study.turn_matrices(turned, kind, 0)
        unturned = {name: torch.arange(len(turn)) for name, turn in turns.items()}
        straight = study.mean_squares(dense, tokenizer, unturned, 1024)
        seen[kind] = study.mean_squares(turned, tokenizer, turns, 1024)
        assert not any(isinstance(module, study.Turned) for module in turned.modules())
        for name, squares in seen[kind].items():
            torch.testing.assert_close(squares.sum(), straight[name].sum(), rtol=1e-4, atol=0)
            if kind == "permuted":
                torch.testing.assert_close(squares, straight[name][turns[name]], rtol=1e-3, atol=1e-6)


@needs_llama_cpp
def test_llama_cpp_s_own_blocks(model, short_text):
    dense, tokenizer = model
    found, bits = {}, {}
    for arm in (study.LlamaCpp("Q4_0"), study.LlamaCpp("Q4_0", 1024), study.LlamaCpp("Q4_K_M"), study.LlamaCpp("Q8_0")):
        found[arm], bits[arm] = study.quantized(dense, tokenizer, "permuted", 0, arm)
    plain, weighed, mixed, fine = found
    assert bits[plain] == bits[weighed] == 4.5 and 4.5 < bits[mixed] < 6 and bits[fine] == 8.5
    turned = gguf_files.model_of("llama")
    study.turn_matrices(turned, "permuted", 0)
    name = "model.layers.1.mlp.down_proj"
    weight = turned.get_submodule(name).weight.detach()
    error = {arm: float((found[arm].get_submodule(f"{name}.inner").packed.unpack() - weight).norm()) for arm in found}
    assert error[fine] < 0.1 * error[plain] and error[mixed] < error[plain] < 0.15 * float(weight.norm())
    assert error[weighed] != error[plain]
    formats = {found[arm].lm_head.format for arm in found}
    assert formats == {"q8"}  # embedding and head are the same for all


@needs_llama_cpp
def test_a_type_that_llama_cpp_does_not_know():
    with Worker("llama_cpp", 1) as worker, pytest.raises(Failed, match="Q5_9"):
        worker.prepare({"gguf": "a", "quantised": "b", "type": "Q5_9", "threads": 1})


def run_tiny(tmp_path, size=TINY, model=None):
    return study.run(model or tiny_model("llama"), ByteTokenizer(), size, tmp_path / "journal.jsonl")


def test_without_llama_cpp_its_arms_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_LLAMA_CPP_PYTHON", "/no/such/python")
    run = run_tiny(tmp_path)
    assert run.arms == [study.DENSE, study.FINE, "4-bit symmetric gptq"]
    assert run.left_out.keys() == {study.Q4_0, study.MIXED} and "/no/such/python" in run.left_out[study.Q4_0]
    assert len(run.records) == 2 * 3 and all(len(record["nll"]) == 3 for record in run.records)
    own = run.nll("permuted", study.DENSE)
    np.testing.assert_allclose(own, run.nll("rotated", study.DENSE), rtol=1e-4)
    assert np.abs(run.nll("permuted", "4-bit symmetric gptq") - own).max() > 1e-3
    result = report.result(run).to_dict()
    assert result["left out"] == run.left_out and not any("llama" in row["name"] for row in result["rows"])
    assert [claim["claim"][:6] for claim in result["claims"]] == ["8 bits"]
    assert len(list(report.tables(run))) == len(study.KINDS) + 1


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_LLAMA_CPP_PYTHON", "/no/such/python")
    first = run_tiny(tmp_path)
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-1]))
    measured, own = [], study.quantized

    def noting(model, tokenizer, kind, seed, arm):
        measured.append(arm)
        return own(model, tokenizer, kind, seed, arm)

    monkeypatch.setattr(study, "quantized", noting)
    second = run_tiny(tmp_path)
    assert [type(arm) for arm in measured if not isinstance(arm, study.LlamaCpp)] == [Quantize]
    assert first.records == second.records
    measured.clear()
    run_tiny(tmp_path, replace(TINY, tokens=48))  # other windows are another measurement
    assert len(measured) > 5


def test_the_paper_s_size_at_a_tiny_setting(model, copying, short_text, tmp_path):
    """An arm of every kind with every seed. This llama.cpp's matrices are dense, so that ours may all have 8 bits."""
    dense, tokenizer = model
    arms = (study.DENSE, "4-bit symmetric search", study.Q4_K_M, study.Q4_K_M + study.WEIGHED, study.MIXED)
    size = replace(
        study.PAPER, windows=2, loads=0, arms=arms, tokens=24, seeds=(0, 1), calibration_tokens=1024, corpus=""
    )
    run = study.run(dense, tokenizer, size, tmp_path / "journal.jsonl")
    assert tuple(run.arms) == arms and not run.left_out
    assert len(run.records) == len(study.KINDS) * 2 * len(arms)
    assert len(run.nll("rotated", study.MIXED)) == 4 and run.bits("permuted", study.MIXED) == 8.5
    assert len(run.pairs) == 2


def record(kind, arm, nll, bits=4.5):
    return {"kind": kind, "seed": 0, "arm": arm, "nll": nll, "bits": bits}


def run_of(ours, theirs, fine, loads=None) -> study.Run:
    base = np.linspace(3.0, 4.0, 8)
    arms = {study.DENSE: 0.0, study.FINE: fine, study.OURS[study.Q4_0]: ours, study.Q4_0: theirs}
    noise = np.resize([0.01, -0.01], 8)
    records = [
        record(kind, arm, (base + rise + (noise if rise else 0) * (arm == study.Q4_0)).tolist())
        for kind in study.KINDS
        for arm, rise in arms.items()
    ]
    return study.Run(study.Size(8, 3, tuple(arms)), records, loads or {}, {})


def seconds(*load):
    return [{"load": value, "use": 2 * value} for value in load]


def test_verdicts_follow_the_intervals():
    assert study.verdicts(run_of(0.1, 0.2, 0.001)) == [
        ("4-bit symmetric gptq has no higher NLL than llama.cpp Q4_0", "holds"),
        ("8 bits lose at most 0.01 nats per token", "holds"),
    ]
    loads = {study.THEIRS: seconds(2.0, 2.2, 2.1), study.MINE: seconds(0.5, 0.4, 0.45)}
    words = [verdict for _, verdict in study.verdicts(run_of(0.199, 0.2, 0.02, loads))]
    assert words == ["weaker", "does not hold", "holds"]
    loads[study.MINE] = seconds(0.5, 0.9, 0.55)
    run = run_of(0.3, 0.2, 0.0, loads)
    assert [verdict for _, verdict in study.verdicts(run)] == ["does not hold", "holds", "weaker"]
    rows = {row.name: row for row in report.result(run).rows}
    assert rows["rotated/4-bit symmetric gptq against llama.cpp Q4_0/NLL"].value == pytest.approx(0.1)
    assert rows["loading/lissom 4-bit/use"].value == pytest.approx(1.1)
    assert rows["loading/share/load"].value == pytest.approx(0.55 / 2.1)
    assert len(list(report.tables(run))) == 4


def test_a_verdict_needs_every_interval():
    below, across, above = Interval(-0.2, -0.3, -0.1), Interval(-0.1, -0.3, 0.1), Interval(0.1, -0.1, 0.3)
    assert verdict([below, below]) == "holds" and verdict([below, across]) == "weaker"
    assert verdict([below, above]) == "does not hold" and verdict([above], 0.3) == "holds"
    assert verdict([Interval(0, 0, 0)]) == "holds" and verdict([Interval(0, 0, 0)], strict=True) == "weaker"


def test_loading_is_measured_in_turns_behind_a_round_that_does_not_count(monkeypatch):
    asked = []

    def fresh(target, folder):
        asked.append(folder)
        return {"load": float(len(asked)), "use": 0.0}, 0

    monkeypatch.setattr(loading, "in_fresh_process", fresh)
    found = loading.loading_times({"one": Path("1"), "two": Path("2")}, 2)
    assert asked == ["1", "2", "2", "1", "1", "2"]
    assert {name: [each["load"] for each in times] for name, times in found.items()} == {"one": [4, 5], "two": [3, 6]}


def test_both_checkpoints_are_loaded(tmp_path, monkeypatch):
    kinds = []

    def here(target, folder):
        from transformers import AutoModelForCausalLM

        kinds.append(any(isinstance(m, PackedLinear) for m in AutoModelForCausalLM.from_pretrained(folder).modules()))
        return loading.time_loading(folder), 0

    monkeypatch.setattr(loading, "in_fresh_process", here)
    run = run_tiny(tmp_path, replace(TINY, arms=(study.DENSE, study.FINE), loads=1))
    assert kinds == [False, True, True, False]
    assert all(0 < times["load"] < times["use"] for name in study.LOADED for times in run.loads[name])
    assert study.verdicts(run)[-1][0] == "our 4-bit checkpoint loads in at most 0.3 of the time"


def test_windows_come_from_different_documents():
    windows = study.windows_of(ByteTokenizer(), study.Size(4, 0, tokens=64))
    assert [len(window) for window in windows] == [64] * 4
    assert len({tuple(window.tolist()) for window in windows}) == 4
    with pytest.raises(UserError, match="9999 are asked for"):
        study.windows_of(ByteTokenizer(), study.Size(9999, 0))


def test_the_check_is_known_by_its_name():
    assert check_of("quantize") is report.CHECK
