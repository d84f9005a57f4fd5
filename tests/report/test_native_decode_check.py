"""The check of native decode: what its figures say, and that a run goes on where it was stopped."""

from __future__ import annotations

import pytest
from fake_peers import COUNTING, REFUSING, FakePeers, tiny_file

from lissom.evals.checks import native_decode as study
from lissom.evals.peers import Comparison, Figure, Size
from lissom.report.checks import native_decode as report

COUNTS = [1]


def measured(speeds: dict[str, float], part: study.Part, bandwidth: list[float]) -> study.Measured:
    """`speeds`: tokens per second, and first tokens per second, of each runtime, with little noise."""
    figures = [
        Figure(
            *(label, label, part.threads, part.context),
            first=[1 / speed] * 3,
            steps=[1 / (speed * noise) for noise in (0.99, 1.0, 1.01)],
            peak=1,
            facts={"weight bytes": 5e8} if label.startswith("lissom") else {},
        )
        for label, speed in speeds.items()
    ]
    return study.Measured(part, Comparison("x", figures, {"openvino int4": "is not installed"}, []), bandwidth)


@pytest.mark.parametrize(
    ("ours", "generate", "verdicts"),
    [(300, 250, ["holds", "holds"]), (200, 150, ["weaker", "weaker"]), (90, 100, ["does not hold", "does not hold"])],
)
def test_verdicts_follow_the_whole_interval(ours, generate, verdicts):
    part = next(part for part in study.default(COUNTS) if (part.name, part.context) == ("decode", 512))
    run = [measured({"lissom": ours, "lissom generate()": generate, "llama.cpp": 100}, part, [])]
    found = report.result(run)
    assert [claim.verdict for claim in found.claims] == verdicts
    assert f"{ours / 100:.2f}x" in found.claims[0].claim
    assert found.facts["failed"] == {"decode, context 512, 1 thread: openvino int4": "is not installed"}
    row = next(row for row in found.rows if row.name == "decode/threads 1/context 512/lissom against llama.cpp/decode")
    assert row.ratio == pytest.approx(ours / 100, rel=0.02)


def test_no_claim_is_made_of_what_was_not_measured():
    parts = study.default(COUNTS)
    assert not report.result([measured({"lissom": 100}, part, []) for part in parts]).claims


@pytest.mark.parametrize(("speed", "verdict"), [(50, "holds"), (30, "does not hold")])
def test_the_share_of_the_bandwidth(speed, verdict):
    part = next(part for part in study.default(COUNTS) if part.name == "billion")
    found = report.result([measured({"lissom": speed}, part, [28e9, 30e9])])
    share = next(row for row in found.rows if row.name.endswith("lissom/share of the bandwidth"))
    assert share.value == pytest.approx(speed * 5e8 / 30e9, rel=1e-6)
    assert [claim.verdict for claim in found.claims] == [verdict]


def test_a_run_goes_on_behind_its_last_part(tmp_path, monkeypatch):
    asked = []

    def compare(model, contexts, threads, arms, size, progress):
        asked.append((model, contexts, threads, [arm.label for arm in arms], size))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return Comparison(model, [], {}, [])

    monkeypatch.setattr(study, "compare", compare)
    monkeypatch.setitem(study.SIZES, "quick", lambda counts: study.small(counts))
    journal = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        study.run("m", "quick", journal, counts=COUNTS)
    run = study.run("m", "quick", journal, counts=COUNTS)
    parts = study.small(COUNTS)
    assert [one.part for one in run] == parts
    assert len(asked) == len(parts) + 1  # the interrupted one twice, the first one once
    assert asked[0][:3] == ("m", (512,), (1,))
    assert "llama.cpp" in asked[0][3]
    assert isinstance(asked[0][4], Size)
    study.run("another", "quick", journal, counts=COUNTS)
    assert len(asked) == 2 * len(parts) + 1  # of another model nothing is known


def test_a_part_is_measured_again_when_a_runtime_was_upgraded_or_runs_by_now(tmp_path, monkeypatch):
    peers = FakePeers(tmp_path / "peers", monkeypatch)
    arms = (peers.runtime("steady", COUNTING), peers.runtime("shaky", REFUSING))
    for arm in arms:
        peers.install(arm.runtime, "1.0")
    size = Size(reads=2, rounds=2, tokens=3)
    part = study.Part("decode", 8, 1, tuple(arm.label for arm in arms), size)
    monkeypatch.setattr(study, "ARMS", arms)
    monkeypatch.setitem(study.SIZES, "quick", lambda counts: [part])
    measured, compare = [], study.compare

    def counted(model, contexts, threads, chosen, size, progress):
        measured.append(size)
        return compare(model, contexts, threads, chosen, size, progress)

    monkeypatch.setattr(study, "compare", counted)
    model = tiny_file(tmp_path)

    def run():
        measured.clear()
        (one,) = study.run(model, "quick", tmp_path / "journal.jsonl", counts=COUNTS)
        return {figure.arm for figure in one.comparison.figures}

    assert run() == {"steady"} and measured == [size]
    assert run() == {"steady"} and measured == [size.least]  # the one that failed was tried, and failed again
    peers.runtime("shaky", COUNTING)
    assert run() == {"steady", "shaky"} and measured == [size.least, size]
    assert run() == {"steady", "shaky"} and not measured
    peers.install("steady", "2.0")
    assert run() == {"steady", "shaky"} and measured == [size]
