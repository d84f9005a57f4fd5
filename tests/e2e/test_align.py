"""`lissom align` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from lissom.cli import app
from lissom.errors import UserError

TINY = ("--hidden-size", 32, "--layers", 1, "--heads", 2, "--format-steps", 20)
SMALL = ("--steps", 3, "--prompts", 4, "--num-generations", 4, "--minibatches", 2, "--held-out", 6, "--eval-steps", 2,
         "--eval-completions", 4, "--save-steps", 1)  # fmt: skip


@pytest.fixture(scope="module")
def run(lissom_cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("align") / "run"
    log = folder.parent / "log.json"
    done = lissom_cli(
        "align", "new", "--task", "countdown", *TINY, *SMALL, "--num-iterations", 2, "-o", folder, "--json", log
    )
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads(log.read_text())


def test_a_new_policy_learns_and_is_used(run, lissom_cli):
    folder, done, log = run
    assert "mean@4 of held-out prompts" in done.stdout
    assert "reward" in done.stderr and "mean@4" in done.stderr
    assert log["policy"]["hidden"] == 32 and log["history"][0]["step"] == 0
    assert (folder / "model.safetensors").exists() and not (folder / "training_args.bin").exists()
    said = lissom_cli("generate", folder, "3 5 7>22:", "--max-new-tokens", 4)
    assert said.returncode == 0, said.stderr


def test_a_run_that_has_ended_is_not_gone_on_with(run, lissom_cli):
    folder, _, _ = run
    again = lissom_cli("align", "new", "--task", "countdown", *TINY, *SMALL, "--num-iterations", 2, "-o", folder)
    assert again.returncode == 2 and "has ended" in again.stderr


def test_a_killed_run_goes_on(run, lissom_cli, tmp_path):
    folder, _, _ = run
    command = [sys.executable, "-m", "lissom", "align", "new", "--task", "countdown", *map(str, TINY), *map(str, SMALL),
               "--num-iterations", "2", "-o", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 8" in line:  # behind the second checkpoint
            process.kill()
            break
    process.wait()
    done = lissom_cli(*command[3:])
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stderr
    one, other = load_file(folder / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all((one[name] == other[name]).all() for name in one)


def test_a_chat_model_on_a_file_with_a_function_of_ones_own(lissom_cli, tiny_folder, tmp_path):
    (tmp_path / "short_rewards.py").write_text(
        "def short(completions, wanted, **columns):\n"
        "    return [1 / (1 + abs(len(str(c)) - w)) for c, w in zip(completions, wanted)]\n"
        "def broken(completions, **columns):\n    raise OSError('no judge')\n"
    )
    rows = [{"prompt": f"Say {n}.", "wanted": n} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("align", tiny_folder, "--task", tmp_path / "prompts.jsonl", *SMALL, "--max-completion-length", 6)
    environment = {"PYTHONPATH": str(tmp_path)}
    done = lissom_cli(
        *options, "--reward", "short_rewards:short", "--reward-range", "0,1", "-o", tmp_path / "a", **environment
    )
    assert done.returncode == 0, done.stderr
    assert "no clip does anything" not in done.stderr
    broken = lissom_cli(*options, "--reward", "short_rewards:broken", "-o", tmp_path / "b", **environment)
    assert broken.returncode == 2 and "raised OSError: no judge" in broken.stderr
    assert len(broken.stderr.strip().splitlines()[-1]) < 200


@pytest.mark.parametrize("method", ["bandpo", "v05", "tree-distill"])
def test_two_processes_train_one_policy(method, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lissom"]
    options = ("align", "new", "--task", "arithmetic", *TINY, *SMALL, "--method", method, "-o", tmp_path / "run")
    if method == "tree-distill":
        options += ("--set", "simulations=6", "--set", "target=steps")
    done = subprocess.run(
        [*command, *map(str, options)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mean@4 of held-out prompts") == 1
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert (tmp_path / "run" / "value_head.safetensors").exists() == (method == "tree-distill")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--task", "sudoku"), "countdown or arithmetic"),
        (("--task", "countdown", "--reward", "json:loads"), "correct"),
        (("--task", "countdown", "--reward-range", "0,1"), "--reward-range"),
        (("--task", "countdown", "--method", "ppo"), "method"),
        (("--task", "countdown", "--bounds", "none"), "band, clip"),
        (("--task", "countdown", "--method", "grpo", "--bounds", "dcpo"), "of --method bandpo"),
        (("--task", "countdown", "--method", "grpo", "--set", "radius=1"), "has no settings"),
        (("--task", "countdown", "--method", "v05", "--set", "most=2"), "first=4, most=2"),
        (("--task", "countdown", "--method", "v05", "--prior", "oracle"), "gp, ridge"),
        (("--task", "countdown", "--method", "tree-distill", "--set", "simulations=0"), "simulations=0"),
        (("--task", "countdown", "--method", "tree-distill", "--set", "breadth=2"), "no such setting"),
        (("--task", "countdown", "--set", "radius=0"), "radius=0"),
        (("--task", "countdown", "--set", "reach=1"), "no such setting"),
        (("--task", "countdown", "--num-generations", 1), "at least 2"),
        (("--task", "countdown", "--minibatches", 5), "do not divide"),
        (("--task", "countdown", "--loss-type", "cispo"), "cispo"),
        (("--task", "countdown", "--steps", 0), "steps=0"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(options, words, tmp_path):
    refused("align", "new", *TINY, *SMALL, *options, "-o", tmp_path / "run", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--task", "nothing.jsonl", "--reward", "math:sqrt"), "no file nothing.jsonl"),
        (("--task", "nothing.jsonl"), "Who judges"),
        (("--task", "nothing.jsonl", "--reward", "sqrt"), "package.module:function"),
        (("--task", "nothing.jsonl", "--reward", "math:sqrt", "--reward-range", "1"), "LOW,HIGH"),
    ],
)
def test_files_and_functions_that_are_not_there(options, words, tiny_folder, tmp_path):
    refused("align", tiny_folder, *SMALL, *options, "-o", tmp_path / "run", words=words)


def refused(*arguments, words):
    """In this process: what `lissom` makes of a `UserError` is tested elsewhere, and each start takes seconds."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    assert isinstance(done.exception, UserError), done.output
    assert words in str(done.exception)
