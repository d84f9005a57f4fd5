from __future__ import annotations

import importlib.util
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_peers import COUNTING, REFUSING, FakePeers, tiny_file

from lissom.errors import UserError
from lissom.evals.peers import (
    ARMS,
    Arm,
    Comparison,
    Figure,
    Size,
    choose,
    compare,
    identity,
    kept,
    process,
    stands,
    summarise,
)
from lissom.evals.peers.worker import Session
from lissom.evals.stats import median_interval, ratio_interval
from lissom.report.peers import result, rows, tables

SMALL = Size(reads=2, rounds=2, tokens=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_file(tmp_path_factory.mktemp("peers"))


def arms(*names: str) -> list[Arm]:
    return [arm for arm in ARMS if arm.name in names]


def by_name(comparison: Comparison) -> dict[str, Figure]:
    return {figure.arm: figure for figure in comparison.figures}


def test_lissom_and_transformers_compute_the_same(model):
    seen = []
    wanted = arms("lissom", "lissom generate()", "transformers fp32")
    found = compare(model, (24, 70), (1,), wanted, SMALL, lambda what, done, total: seen.append((done, total)))
    assert not found.failed
    assert {(figure.arm, figure.context) for figure in found.figures} == {
        (arm.name, context) for arm in wanted for context in (24, 70)
    }
    for figure in found.figures:
        assert len(figure.first) == len(figure.steps) == 2 and min(figure.first + figure.steps) > 0
        assert len(figure.tokens) == 1 + 2 * (3 + 1)
        assert figure.peak > 1e7
    assert len({tuple(figure.tokens) for figure in found.figures if figure.context == 70}) == 1
    assert seen[-1][0] == seen[-1][1] == 3 * (1 + 2 * (1 + 2 + 2))
    assert Comparison.of_dict(json.loads(json.dumps(found.to_dict()))) == found


HAS_LLAMA_CPP = os.environ.get("LISSOM_LLAMA_CPP_PYTHON") or importlib.util.find_spec("llama_cpp")


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="needs llama-cpp-python, here or where LISSOM_LLAMA_CPP_PYTHON points")
def test_llama_cpp_computes_the_same_on_the_same_file(model):
    found = compare(model, (40,), (1,), arms("lissom", "llama.cpp, plain", "llama.cpp, flash attention"), SMALL)
    assert not found.failed
    assert len({tuple(figure.tokens[:4]) for figure in found.figures}) == 1
    # One line for both settings of llama.cpp.
    assert {value.label for value in summarise(found)} == {"lissom", "llama.cpp"}


FAKES = {
    "counting": COUNTING,
    "absent": "import no_such_runtime\n",
    "refusing": REFUSING,
    "dying": "import os, sys\n"
    "class Runtime:\n    facts = {}\n    def __init__(self, settings):\n        pass\n"
    "    def generate(self, ids, capacity, emit):\n"
    "        print('out of luck', file=sys.stderr, flush=True)\n        os._exit(3)\n",
    "short": "class Runtime:\n    facts = {}\n    def __init__(self, settings):\n        pass\n"
    "    def generate(self, ids, capacity, emit):\n        emit(1)\n",
}


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> list[Arm]:
    """Runtimes of which only `counting` can be measured."""
    peers = FakePeers(tmp_path, monkeypatch)
    return [peers.runtime(name, code) for name, code in FAKES.items()]


def test_what_fails_is_listed_and_takes_nothing_down(model, fakes, monkeypatch):
    nowhere = Arm("nowhere", "nowhere", "model")
    monkeypatch.setenv("LISSOM_NOWHERE_PYTHON", "/no/such/python")
    found = compare(model, (5,), (1,), [*fakes, nowhere], SMALL)
    (figure,) = found.figures
    assert figure.arm == "counting" and figure.facts == {"made": "here"}
    assert figure.tokens == list(range(1 + 2 * (3 + 1)))
    assert set(found.failed) == {"absent", "refusing", "dying", "short", "nowhere"}
    assert "no_such_runtime" in found.failed["absent"] and "LISSOM_ABSENT_PYTHON" in found.failed["absent"]
    assert found.failed["refusing"] == "not this model"
    assert found.failed["dying"] == "the process ended: out of luck"
    assert "/no/such/python" in found.failed["nowhere"]
    assert all("\n" not in reason for reason in found.failed.values())


def test_a_worker_that_is_left_ends_with_all_it_started(fakes):
    with process.Worker("counting", 1) as worker:
        worker.open({})
        worker.ask("read", ids=[1], capacity=9)
    assert worker._process.returncode is not None
    with pytest.raises(process.Failed):
        worker.ask("read", ids=[1], capacity=9)


def test_session_drops_what_is_generated_when_something_else_is_wanted(fakes, tmp_path):
    runtime = str(tmp_path / "runtimes" / "counting.py")
    commands = [
        {"do": "step", "count": 1},  # nothing is being read yet
        {"do": "open", "runtime": runtime, "settings": {}},
        {"do": "read", "ids": [1, 2], "capacity": 9},
        {"do": "step", "count": 2},
        {"do": "read", "ids": [1], "capacity": 9},
    ]
    replies = io.StringIO()
    Session(io.StringIO("".join(json.dumps(command) + "\n" for command in commands)), replies).run()
    told = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert "nothing is being read" in told[0]["error"]
    assert [answer.get("tokens") for answer in told[1:]] == [None, [0], [1, 2], [0]]
    assert len(told[3]["seconds"]) == 2


def test_identity_is_of_the_python_and_the_versions_that_run_an_arm(tmp_path, monkeypatch):
    peers = FakePeers(tmp_path, monkeypatch)
    arm = peers.runtime("counting", COUNTING)
    states = [identity([arm])]
    for version, where in (("1.0", "python"), ("2.0", "python"), ("2.0", "another")):
        python = peers.install("counting", version, where)
        states.append(identity([arm]))
        assert states[-1][0]["python"] == python and states[-1][0]["versions"] == {"counting": version}
    monkeypatch.setenv("LISSOM_COUNTING_PYTHON", "/no/such/python")
    kept._versions.cache_clear()
    states.append(identity([arm]))
    assert states[0][0]["versions"] == states[-1][0]["versions"] == {"counting": None}
    assert len({json.dumps(state) for state in states}) == len(states)


def test_a_python_is_asked_for_its_versions_once(tmp_path, monkeypatch):
    peers = FakePeers(tmp_path, monkeypatch)
    arm, started = peers.runtime("counting", COUNTING), []
    peers.install("counting", "1.0")
    monkeypatch.setattr(kept, "Worker", lambda *given: started.append(given) or process.Worker(*given))
    assert identity([arm, replace(arm, name="other setting")]) != identity([arm])
    assert len(started) == 1


def test_kept_figures_stand_until_what_failed_runs(tmp_path, monkeypatch):
    peers = FakePeers(tmp_path, monkeypatch)
    peers.install("broken", "1.0")
    whole, broken, absent = (peers.runtime(name, COUNTING) for name in ("whole", "broken", "absent"))
    tried = []

    def attempt(runs: bool):
        def answer(arms):
            tried.append([arm.name for arm in arms])
            return Comparison("m", [figure_of("broken", "broken", 1)] if runs else [], {}, [])

        return answer

    found = Comparison("m", [], {"broken": "it crashed", "absent": "is not installed"}, [])
    assert stands(found, [whole, broken, absent], attempt(runs=False))
    assert not stands(found, [whole, broken, absent], attempt(runs=True))
    assert tried == [["broken"]] * 2
    assert stands(found, [whole, absent], attempt(runs=True)) and len(tried) == 2


def test_every_real_arm_says_what_it_needs():
    assert all(arm.packages for arm in ARMS)


def test_choose():
    assert choose() == ARMS
    assert {arm.label for arm in choose(["llama.cpp", "openvino int4"])} == {"llama.cpp", "openvino int4"}
    (ours, *_) = choose(["lissom"], kv="int8")
    assert ours.settings["kv"] == "int8" and ours.settings["weights"] == "auto"
    with pytest.raises(UserError, match="no runtime 'lama'"):
        choose(["lissom", "lama"])


@pytest.mark.parametrize(
    ("contexts", "threads", "words"),
    [((0,), (1,), "at least 1"), ((600,), (1,), "at most 512"), ((8,), (0,), "0 threads")],
)
def test_a_size_that_cannot_be_measured_is_refused(model, contexts, threads, words):
    with pytest.raises(UserError, match=words):
        compare(model, contexts, threads, arms("lissom"), SMALL)


def figure_of(name: str, label: str, rate: float, first: float = 1.0, peak: int = 100) -> Figure:
    return Figure(name, label, 2, 64, [first] * 3, [1 / rate] * 3, [1], peak)


def made_up() -> Comparison:
    figures = [
        figure_of("lissom", "lissom", 300, 0.1, 200),
        figure_of("a", "peer", 100, 0.4),
        figure_of("b", "peer", 150, 0.5),
    ]
    return Comparison("model", figures, {"other": "is not installed"}, ["a note"])


def test_the_best_setting_of_a_runtime_counts():
    found = {(value.label, value.metric.name): value for value in summarise(made_up())}
    assert found["peer", "decode"].arm == "b" and found["peer", "first token"].arm == "a"
    ours = found["lissom", "decode"]
    assert ours.against(found["peer", "decode"]).estimate == pytest.approx(2)
    assert found["lissom", "first token"].against(found["peer", "first token"]).estimate == pytest.approx(4)
    assert found["lissom", "peak memory"].against(found["peer", "peak memory"]).estimate == pytest.approx(0.5)


def test_rows_and_tables():
    found = {row.name: row for row in rows(made_up(), "part/")}
    row = found["part/threads 2/context 64/lissom against peer/decode"]
    assert (row.value, row.baseline, row.ratio, row.n) == pytest.approx((300, 150, 2, 3))
    assert found["part/threads 2/context 64/peer/decode"].value == pytest.approx(150)
    facts = result(made_up()).to_dict()
    assert facts["failed"] == {"other": "is not installed"}
    assert facts["settings"]["threads 2/context 64/peer/decode"] == "b"
    (table,) = tables(made_up())
    assert table.row_count == 2


def test_intervals_of_medians_and_ratios():
    random = np.random.default_rng(0)
    drift = random.uniform(1, 3, 40)  # a machine that changes its pace hurts both alike
    ours, theirs = 2 * drift * random.normal(1, 0.01, 40), drift * random.normal(1, 0.01, 40)
    paired, apart = ratio_interval(ours, theirs), ratio_interval(ours, theirs[:-1])
    assert paired.low < 2.01 and paired.high > 1.99
    assert paired.high - paired.low < apart.high - apart.low
    alone = median_interval([3.0])
    assert (alone.estimate, alone.low, alone.high) == (3, 3, 3)


def test_worker_needs_the_standard_library_alone():
    import ast

    tree = ast.parse((Path(process.__file__).parent / "worker.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
