"""`lissom bench` as a user calls it, on a model of no size."""

from __future__ import annotations

import json

import pytest


def test_bench(lissom_cli, tiny_folder, tmp_path):
    file = tmp_path / "bench.json"
    given = ("--only", "lissom,transformers", "--contexts", "80,16", "--threads", "1", "--rounds", "2", "--tokens", "4")
    done = lissom_cli("bench", tiny_folder, *given, "--json", file)
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout and "context 16" in done.stdout and "Not measured" not in done.stdout
    facts = json.loads(file.read_text())
    assert {"name", "machine", "versions", "date", "rows", "model", "runtimes", "failed"} <= set(facts)
    assert facts["name"] == "bench" and facts["failed"] == {}
    rows = {row["name"]: row for row in facts["rows"]}
    for row in rows.values():
        assert set(row) == {"name", "value", "unit", "baseline", "ratio", "low", "high", "n"}
    for context in (16, 80):
        row = rows[f"threads 1/context {context}/lissom against transformers fp32/decode"]
        assert row["unit"] == "tokens/s" and row["ratio"] == pytest.approx(row["value"] / row["baseline"])
        assert row["low"] <= row["ratio"] <= row["high"]
        assert rows[f"threads 1/context {context}/lissom cache ÷ 10/first token"]["unit"] == "s"
        assert rows[f"threads 1/context {context}/lissom/peak memory"]["value"] > 1e7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--only", "lama.cpp"), "no runtime 'lama.cpp'"),
        (("--contexts", "many"), "--contexts many"),
        (("--threads", "0"), "--threads 0"),
        (("--weights", "int3"), "weights='int3'"),
        (("--contexts", "100000", "--only", "transformers"), "at most 2048"),
    ],
)
def test_mistakes_are_sentences(run, tiny_folder, given, words):
    code, _, err = run("bench", tiny_folder, *given)
    assert code == 2
    assert words in err and "Traceback" not in err


def test_a_runtime_that_is_missing_is_named(run, tiny_folder, monkeypatch):
    monkeypatch.setenv("LISSOM_ONNXRUNTIME_PYTHON", "/no/such/python")
    code, _, err = run("bench", tiny_folder, "--only", "onnxruntime")
    assert code == 2
    assert "onnxruntime int4" in err and "/no/such/python" in err
