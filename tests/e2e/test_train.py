"""`lissom train` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lissom.train.folder import RunFolder

TEXT = "The cat sat on the mat, and the dog ran after the cat. " * 400
SMALL = ("--steps", 6, "--context", 16, "--batch-size", 2, "--warmup-steps", 1, "--logging-steps", 2, "--save-steps", 3)
NEW = ("--layers", 1, "--hidden-size", 48, "--heads", 3, "--vocabulary", 300)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.md").write_text(TEXT.upper())
    return folder


def test_a_new_ternary_model_is_trained_packed_and_used(lissom_cli, text, tmp_path):
    command = (
        "train",
        "new",
        "--text",
        text,
        *SMALL,
        *NEW,
        "--method",
        "sparse-bitnet",
        "--set",
        "n=2",
        "--set",
        "m=4",
    )
    done = lissom_cli(*command, "-o", tmp_path / "run", "--packed", tmp_path / "small", "--json", tmp_path / "log.json")
    assert done.returncode == 0, done.stderr
    assert "NLL of held-out text" in done.stdout and "zeros" in done.stderr
    history = json.loads((tmp_path / "log.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 3, 4, 6]  # 3 is saved
    assert not list((tmp_path / "run").glob("*.bin"))  # no pickle is left behind
    used = lissom_cli("generate", tmp_path / "small", "The cat", "--max-new-tokens", 4)
    assert used.returncode == 0, used.stderr
    again = lissom_cli(*command, "-o", tmp_path / "run")
    assert again.returncode == 2 and "has ended" in again.stderr
    on = ("train", tmp_path / "run", "--text", text, *SMALL)
    further = lissom_cli(*on, "-o", tmp_path / "further", "--packed", tmp_path / "smaller")
    assert further.returncode == 0 and "mask_flips" in further.stderr, further.stderr
    other = lissom_cli(*on, "-o", tmp_path / "other", "--method", "sparse-bitnet", "--set", "n=1")
    assert other.returncode == 2 and "in training with sparse-bitnet 2:4" in other.stderr
    exported = lissom_cli("export", "packed", tmp_path / "run", "-o", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("small", "exported"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    twice = lissom_cli("export", "packed", tmp_path / "run", "-o", tmp_path / "exported")
    assert twice.returncode == 2 and "is there already" in twice.stderr
    foreign = lissom_cli("export", "packed", tmp_path / "small", "-o", tmp_path / "none")
    assert foreign.returncode == 2 and "not in training" in foreign.stderr
    packed = lissom_cli("train", tmp_path / "small", "--text", text, *SMALL, "-o", tmp_path / "more")
    assert packed.returncode == 2 and "packed weights" in packed.stderr


def test_a_new_model_with_branches_is_trained_and_used(lissom_cli, text, tmp_path):
    command = ("train", "new", "--text", text, *SMALL, *NEW, "--method", "noble")
    wide = lissom_cli(*command, "-o", tmp_path / "wide")
    assert wide.returncode == 2 and "rank 64 is no narrower than" in wide.stderr
    done = lissom_cli(*command, "--set", "ratio=0.0625", "-o", tmp_path / "run")
    assert done.returncode == 0 and "omega_drift" in done.stderr, done.stderr
    assert "mtime" not in done.stderr
    used = lissom_cli("generate", tmp_path / "run", "The cat", "--max-new-tokens", 4)
    assert used.returncode == 0, used.stderr
    exported = lissom_cli("export", "gguf", tmp_path / "run", "-o", tmp_path / "model.gguf")
    assert exported.returncode == 2 and "no place for what noble adds" in exported.stderr
    packed = lissom_cli("export", "packed", tmp_path / "run", "-o", tmp_path / "packed")
    assert packed.returncode == 2 and not (tmp_path / "packed").exists()
    further = lissom_cli("train", tmp_path / "run", "--text", text, *SMALL, "-o", tmp_path / "further")
    assert further.returncode == 0 and "omega_drift" in further.stderr, further.stderr
    plain = lissom_cli("train", "new", "--text", text, *SMALL, *NEW, "-o", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    on = ("train", tmp_path / "plain", "--text", text, *SMALL, "--method", "noble", "--set", "rank=2")
    refused = lissom_cli(*on, "-o", tmp_path / "on")
    assert refused.returncode == 2 and "mode='add-on'" in refused.stderr
    added = lissom_cli(*on, "--set", "mode=add-on", "-o", tmp_path / "on")
    assert added.returncode == 0, added.stderr


def test_a_model_is_trained_on_with_itself_as_the_teacher(lissom_cli, tiny_folder, text, tmp_path):
    done = lissom_cli(
        "train", tiny_folder, "--teacher", tiny_folder, "--text", text, "-o", tmp_path / "run", *SMALL,
        "--method", "sparse-bitnet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kl" in done.stderr and "hidden" in done.stderr
    other = lissom_cli("train", "new", "--teacher", tiny_folder, "--text", text, "-o", tmp_path / "new", *SMALL, *NEW)
    assert other.returncode == 2 and "another tokenizer" in other.stderr


def test_two_processes_train_one_model(text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lissom"]
    options = ("train", "new", "--text", text, *SMALL, *NEW, "--method", "sparse-bitnet", "-o", tmp_path / "run")
    done = subprocess.run(
        [*command, *map(str, options), "--packed", str(tmp_path / "small")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("NLL of held-out text") == 1
    assert (tmp_path / "small" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options,words",
    [
        (("--set", "n=2"), "--method"),
        (("--method", "sparse-bitnet", "--set", "n"), "NAME=VALUE"),
        (("--method", "sparse-bitnet", "--set", "k=3"), "no setting 'k'"),
        (("--method", "sparse-bitnet", "--set", "n=9"), "n of m"),
        (("--method", "sparse-bitnet", "--set", "m=7"), "multiple of 7 inputs"),
        (("--method", "flash-prefill"), "is not trained"),
        (("--packed", "x"), "packed form"),
        (("--packed", "x", "--method", "sparse-bitnet", "--set", "quantize=false"), "nothing to pack"),
        (("--teacher", "new"), "new"),
        (("--context", 100000), "less than a window"),
        (("--schedule", "steps"), "schedule"),
        (("--held-out", "missing.txt"), "missing.txt"),
        (("--report-to", "trackio"), "pip install trackio"),
        (("--heads", 0), "from 1"),
        (("--seed", -1), "seed"),
        (("--weight-decay", "nan"), "finite"),
        (("--batch-size", 4096), "fewer than a batch"),
    ],
)
def test_mistakes_are_one_sentence(lissom_cli, text, tmp_path, options, words):
    done = lissom_cli("train", "new", "--text", text, "-o", tmp_path / "run", *SMALL, *NEW, *options)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_folder_of_something_else_is_left_alone(lissom_cli, text, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = lissom_cli("train", "new", "--text", text, "-o", tmp_path, *SMALL, *NEW)
    assert done.returncode == 2 and "no run of `lissom train`" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    missing = lissom_cli("train", "new", "--text", tmp_path / "none", "-o", tmp_path / "run", *SMALL, *NEW)
    assert missing.returncode == 2 and "no file, and no folder" in missing.stderr


@pytest.mark.parametrize("where", ["full", "file", "run", "run/packed"])
def test_packed_models_take_the_place_of_nothing(lissom_cli, text, tmp_path, where):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    done = lissom_cli(
        "train", "new", "--text", text, *SMALL, *NEW, "--method", "sparse-bitnet", "-o", tmp_path / "run",
        "--packed", tmp_path / where,
    )  # fmt: skip
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert (tmp_path / "full" / "precious").exists() and (tmp_path / "file").read_text() == "x"


def test_two_runs_do_not_share_a_folder(lissom_cli, text, tmp_path):
    with RunFolder.open(tmp_path / "run", {}):
        done = lissom_cli("train", "new", "--text", text, "-o", tmp_path / "run", *SMALL, *NEW)
    assert done.returncode == 2 and "Another process is training" in done.stderr


def test_what_could_not_begin_may_be_asked_for_otherwise(lissom_cli, text, tmp_path):
    command = ("train", "new", "--text", text, "-o", tmp_path / "run", *SMALL, *NEW, "--method", "sparse-bitnet")
    assert lissom_cli(*command, "--set", "m=7").returncode == 2
    assert lissom_cli(*command, "--vocabulary", 280).returncode == 0
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    record.pop("history")
    (tmp_path / "run" / "train.json").write_text(json.dumps(record))  # as if it had been stopped
    different = {
        "vocabulary 280 and not 300": (),
        "learning_rate 0.0003 and not 0.001": ("--vocabulary", 280, "--lr", 1e-3),
        "gradient dense and not masked": ("--vocabulary", 280, "--set", "gradient=masked"),
        "another held out": ("--vocabulary", 280, "--held-out", text / "a.txt"),
    }
    for words, options in different.items():
        other = lissom_cli(*command, *options)
        assert other.returncode == 2 and words in other.stderr
    (tmp_path / "run" / "train.json").write_text("[]")
    damaged = lissom_cli(*command)
    assert damaged.returncode == 2 and "damaged" in damaged.stderr and "Traceback" not in damaged.stderr
