"""`lissom quantize` as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM


def test_a_model_is_written_that_generates(lissom_cli, run, tiny_folder, tmp_path):
    (tmp_path / "text.txt").write_text("The meeting is on Monday, the report on Tuesday. " * 200)
    out = tmp_path / "out"
    given = ("--calibration", tmp_path / "text.txt", "--calibration-tokens", 1024, "--json", tmp_path / "facts.json")
    done = lissom_cli("quantize", tiny_folder, "-o", out, *given)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (
        facts["bytes_after"] < 0.4 * facts["bytes_before"] and 5 < facts["bits_per_weight"] < 12
    )  # inputs are padded to 64 here
    assert abs(facts["nll_after"] - facts["nll_before"]) < 0.5
    assert set(facts["formats"].values()) == {"q4_min", "q8"}
    assert "bits per weight" in done.stdout and "nats per token" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(out).lm_head.format == "q8"
    done = lissom_cli("generate", out, "When?", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    code, text, err = run("quantize", tiny_folder, "-o", out, "--bits", 8, "--method", "rtn", "--json", "-")
    assert code == 0 and json.loads(text)["bits_per_weight"] > 8, err
    code, _, err = run("quantize", out, "-o", tmp_path / "again")
    assert code == 2 and "quantised already" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json", "out", "text.txt"]


def test_through_a_recipe(run, tiny_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text("methods: [quantize: {bits: 8, method: rtn}]")
    code, _, err = run("apply", tmp_path / "recipe.yaml", tiny_folder, "-o", tmp_path / "out")
    assert code == 0, err
    code, _, err = run("generate", tmp_path / "out", "When?", "--max-new-tokens", 3)
    assert code == 0, err


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--bits", 3], "expected 4 or 8"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--calibration", os.devnull], "has 0 tokens"),
        (["--held-out", "missing.txt"], "missing.txt"),
    ],
)
def test_mistakes(run, tiny_folder, tmp_path, arguments, words):
    code, _, err = run("quantize", tiny_folder, "-o", tmp_path / "out", *arguments)
    assert code == 2 and words in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_other_folders_are_not_written_over(run, tiny_folder, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = run("quantize", tiny_folder, "-o", tmp_path)
    assert code == 2 and "was not written by" in err
    code, _, _ = run("quantize", tiny_folder, "-o", tiny_folder)
    assert code == 2 and (tiny_folder / "model.safetensors").exists()


def test_ctrl_c_leaves_nothing_half_written(tiny_folder, tmp_path):
    output, pipe = tmp_path / "out", tmp_path / "text"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "lissom", "quantize", str(tiny_folder), "-o", str(output)]
    command += ["--calibration", str(pipe), "--calibration-tokens", "65536"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    pipe.write_text("all the king's horses and all the king's men " * 20000)  # returns when it has been read
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Interrupted" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == [pipe]
