"""The main job and what takes its recipe, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM

from lissom.recipes import Recipe


@pytest.fixture(scope="module")
def report(lissom_cli, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    done = lissom_cli("optimize", tiny_folder, "--quick", "--budget", 1.5, "-o", folder, "--max-quality-loss", "90%")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_report_is_whole(report, tiny_folder):
    folder, done = report
    facts = json.loads((folder / "results.json").read_text())
    assert facts["model"] == str(tiny_folder) and facts["finished"] and len(facts["front"]) >= 2
    assert {row["name"].split("/")[-1] for row in facts["rows"]} >= {
        "quality loss",
        "first token",
        "decode",
        "KV cache",
    }
    base = {row["name"]: row for row in facts["rows"]}
    assert base["untouched/quality loss"]["value"] == 0 and base["untouched/peak memory"]["value"] > 1e8
    assert (folder / "index.html").stat().st_size > 1e6
    assert Recipe.load(folder / "recipe.yaml").label == facts["best"]
    assert f"--recipe {folder / 'recipe.yaml'}" in done.stdout
    assert base["untouched/weights and cache"]["value"] > base["untouched/weights"]["value"] > 1e6


def test_native_passes_are_searched_and_other_runtimes_are_beside(report):
    folder, done = report
    facts = json.loads((folder / "results.json").read_text())
    labels = {row["name"].split("/")[0] for row in facts["rows"]}
    assert {"native", "bfloat16 + native"} <= labels and any("h2o" in label and "native" in label for label in labels)
    keys = [key for step in Recipe.load(folder / "recipe.yaml").methods for key in step]
    assert "native-decode" in keys
    peers = {row["name"]: row for row in facts["rows"] if row["name"].startswith("peers/")}
    assert any("lissom recommended against" in name for name in peers)
    assert "lissom recommended" in done.stdout and "Beside other runtimes" in (folder / "index.html").read_text()
    missing = [name for name in facts["peers"]["failed"] if name.startswith("openvino")]
    assert all(name in done.stdout for name in missing)


def test_a_second_run_measures_nothing_again(report, lissom_cli, tiny_folder):
    folder, _ = report

    def known():  # a comparison of runtimes that a busy machine had no time for is made again
        lines = (folder / "measurements.jsonl").read_text().splitlines()
        return [line for line in lines if '"peers/' not in line]

    before = known()
    done = lissom_cli("optimize", tiny_folder, "--quick", "-o", folder, "--max-quality-loss", "90", "--json", "-")
    assert done.returncode == 0 and json.loads(done.stdout)["name"] == "optimize"
    assert known() == before


def test_its_recipe_is_taken_everywhere(report, lissom_cli, tiny_folder, tmp_path):
    recipe = report[0] / "recipe.yaml"
    (tmp_path / "note.txt").write_text("The meeting is on Monday. " * 40)
    done = lissom_cli(
        "generate", tiny_folder, "--recipe", recipe, "-d", tmp_path / "note.txt", "When?", "--max-new-tokens", 4
    )
    assert done.returncode == 0 and "without native" not in done.stderr, done.stderr
    done = lissom_cli("apply", recipe, tiny_folder, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
    again = lissom_cli("generate", tmp_path / "out", "When?", "--max-new-tokens", 4)
    assert again.returncode == 0 and "without native" not in again.stderr, again.stderr
    other = tmp_path / "other.yaml"
    other.write_text("methods: [kv-budget: {size: 1MB, method: h2o}]")
    done = lissom_cli(
        "compare", tiny_folder, recipe, other, "--quick", "--journal", tmp_path / "j", "--json", tmp_path / "c.json"
    )
    assert done.returncode == 0, done.stderr
    assert (
        "kv-budget" in done.stdout and "native" in done.stdout and json.loads((tmp_path / "c.json").read_text())["rows"]
    )


def test_a_recipe_of_native_passes_over_a_files_own_blocks_is_taken_everywhere(lissom_cli, tiny_folder, tmp_path):
    file, recipe = tmp_path / "tiny.gguf", tmp_path / "recipe.yaml"
    done = lissom_cli("export", "gguf", tiny_folder, "-o", file)
    assert done.returncode == 0, done.stderr
    recipe.write_text("weights: packed\nmethods: [native-decode: {kv: int8}, eviction: {ratio: 0.5}]")
    question = ("When?", "--max-new-tokens", 4)
    used = lissom_cli("generate", file, "--recipe", recipe, *question)
    assert used.returncode == 0 and "without native" not in used.stderr, used.stderr
    plain = lissom_cli("generate", file, "--recipe", recipe, "--no-native", *question)
    assert plain.returncode == 0, plain.stderr
    done = lissom_cli("compare", file, recipe, "--quick", "--journal", tmp_path / "j", "--json", tmp_path / "c.json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "c.json").read_text())["rows"]}
    label = Recipe.load(recipe).label
    assert label == "packed + native (kv int8) + snapkv 50%"
    assert rows[f"{label}/KV cache"]["ratio"] > 4  # half of the entries, in 8 bits instead of 32
    assert rows[f"{label}/weights"]["value"] < 1.5 * rows["untouched/weights"]["value"]
    applied = lissom_cli("apply", recipe, file, "-o", tmp_path / "out")
    assert applied.returncode == 0, applied.stderr
    again = lissom_cli("generate", tmp_path / "out", *question)
    assert again.returncode == 0 and again.stdout == used.stdout, again.stderr


def test_apply_does_not_write_over_other_folders(report, run, tiny_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = run("apply", report[0] / "recipe.yaml", tiny_folder, "-o", tmp_path)
    assert code == 2 and "was not written by" in err
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("records", [0, 4])
def test_ctrl_c_keeps_what_is_measured(records, lissom_cli, tiny_folder, tmp_path):
    command = [sys.executable, "-m", "lissom", "optimize", str(tiny_folder), "-o", str(tmp_path / "r")]
    # What a background job of a shell starts ignores the signal; a person's terminal does not.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    journal = tmp_path / "r" / "measurements.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and len(journal.read_text().splitlines()) >= 2 * records:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    if records:
        assert (tmp_path / "r" / "index.html").exists() and (tmp_path / "r" / "recipe.yaml").exists()
        assert not json.loads((tmp_path / "r" / "results.json").read_text())["finished"]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["optimize", "no-such-model"], "no model 'no-such-model'"),
        (["optimize", "--max-quality-loss", "much"], "expected a percentage"),
        (["optimize", "--prefer", "beauty"], "expected speed, memory or balanced"),
        (["optimize", "--device", "toaster"], "no device profile"),
        (["optimize", "-o", "/proc/report"], "/proc/report"),
        (["apply", "missing.yaml", "-o", "x"], "missing.yaml"),
        (["compare", "smollm2-135m", "missing.yaml"], "missing.yaml"),
        (["generate", "smollm2-135m", "--recipe", "missing.yaml", "a"], "missing.yaml"),
        (["generate", "smollm2-135m", "--kv-budget", "little", "a"], "no size"),
    ],
)
def test_mistakes(arguments, words, run, smollm2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 2 and words in err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1


def test_a_document_beyond_the_context(run, tiny_folder, tmp_path):
    (tmp_path / "long.txt").write_text("The meeting is on Monday. " * 500)
    for arguments in (["generate", tiny_folder, "-d", tmp_path / "long.txt", "When?"],
                      ["compact", tiny_folder, "-d", tmp_path / "long.txt", "-o", tmp_path / "x"]):  # fmt: skip
        code, _, err = run(*arguments)
        assert code == 2 and "at most 2048" in err and "Traceback" not in err


def test_a_disk_that_takes_no_more_is_one_sentence(lissom_cli, tiny_folder, tmp_path):
    """A limit on the size of files stands for a full disk: the write fails in the same place."""
    (tmp_path / "note.txt").write_text("The meeting is on Monday. " * 40)
    for arguments in (
        ["compact", tiny_folder, "-d", tmp_path / "note.txt", "-o", tmp_path / "cache.safetensors"],
        ["optimize", tiny_folder, "--quick", "-o", tmp_path / "report"],
    ):
        done = lissom_cli(*arguments, file_limit=600)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr and "large" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "cache.safetensors").exists() and not list(tmp_path.glob(".*"))
