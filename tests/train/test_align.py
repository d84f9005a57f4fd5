"""Runs of learning from reward: resumed exactly, ended by a budget, measured on held-out prompts, on two processes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lissom.errors import UserError
from lissom.rl.band import BandConfig, FixedClip
from lissom.rl.sampling import ended, sample, solved
from lissom.rl.tasks import Countdown, TwoDigitArithmetic
from lissom.rl.tree_search import SearchConfig
from lissom.rl.tree_search.trainer import DistillConfig
from lissom.rl.value_prior import Budget, Ridge, ValuePriorConfig
from lissom.rl.world import file_world, judged, task_world
from lissom.train import TrainConfig
from lissom.train.align import AlignConfig, align
from lissom.train.warm_start import WarmStart, warm_start

TRAINING = TrainConfig(
    steps=60,
    batch_size=16,
    context=64,
    warmup_steps=5,
    learning_rate=1e-2,
    eval_steps=60,
    save_steps=60,
    logging_steps=20,
)
START = WarmStart(hidden=32, layers=1, heads=2, config=TRAINING)
TASK = TwoDigitArithmetic(right=1.0)
CONFIG = AlignConfig(
    method="bandpo", steps=4, prompts=4, num_generations=4, minibatches=2, num_iterations=2, learning_rate=3e-3,
    max_completion_length=6, eval_steps=2, eval_completions=4, save_steps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    warm_start(TASK, folder, START)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def world(**changes):
    return task_world(TASK, 16, 8, "dense", **changes)


def test_a_policy_learns_the_format(policy):
    model, tokenizer = loaded(policy)
    problems = TASK.problems("test", 50)
    texts = [
        tokenizer.decode(own[0], skip_special_tokens=True)
        for own in sample(model, tokenizer, [TASK.prompt(p) for p in problems], 1, 8)
    ]
    assert np.mean([text.isdigit() and 1 <= len(text) <= 3 for text in texts]) > 0.8
    held_out = {tuple(sorted((p.left, p.right))) for p in TASK.problems("test", 4000)}
    traces = [json.loads(line)["text"] for line in (policy / "traces.jsonl").read_text().splitlines()]
    assert not held_out & {tuple(sorted(map(int, t.split("=")[0].replace("-", "+").split("+")))) for t in traces}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(policy, tmp_path, monkeypatch):
    whole = align(CONFIG, *loaded(policy), world(), tmp_path / "whole")
    stops = []

    def stop(done, total):
        stops.append(done)
        if done == 9:  # behind the checkpoint of step 8
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align(CONFIG, *loaded(policy), world(), tmp_path / "part", progress=stop)
    again = align(CONFIG, *loaded(policy), world(), tmp_path / "part")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [e["tokens/generated"] for e in again] == [e["tokens/generated"] for e in whole]
    before = load_file(policy / "model.safetensors")
    assert not all(torch.equal(one[name], before[name]) for name in one)
    assert not list((tmp_path / "whole").glob("*.bin"))


def test_what_is_logged(policy, tmp_path):
    history = align(CONFIG, *loaded(policy), world(), tmp_path)
    measured = [entry for entry in history if "mean@4" in entry]
    assert [entry["step"] for entry in measured] == [0, 8, 16]
    assert all(0 <= entry["mean@4"] <= entry["best@4"] <= 1 for entry in measured)
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == [4, 8, 12, 16]
    assert all("reward" in entry and "band/clipped/up" in entry for entry in steps)
    assert all(a["tokens/generated"] < b["tokens/generated"] for a, b in pairwise(steps))


def test_a_budget_ends_it_behind_a_whole_step(policy, tmp_path):
    history = align(replace(CONFIG, token_budget=20), *loaded(policy), world(), tmp_path)
    assert history[-1]["step"] in (4, 8)
    assert history[-1]["step"] % CONFIG.updates == 0
    assert any("mean@4" in entry for entry in history if entry["step"] == history[-1]["step"])
    assert (tmp_path / "model.safetensors").exists()


def test_plain_grpo_and_bounds_of_another_kind(policy, tmp_path):
    align(replace(CONFIG, method="grpo", steps=2), *loaded(policy), world(), tmp_path / "a")
    align(replace(CONFIG, steps=2), *loaded(policy), world(), tmp_path / "b", FixedClip(0.2, 0.2))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(UserError, match="has no settings"):
        align(replace(CONFIG, method="grpo"), *loaded(policy), world(), tmp_path / "c", BandConfig())
    with pytest.raises(UserError, match="another method"):
        align(replace(CONFIG, method="v05"), *loaded(policy), world(), tmp_path / "c", BandConfig())


def test_trees(policy, tmp_path):
    chosen = DistillConfig(SearchConfig(simulations=6), step_tokens=6)
    config = replace(CONFIG, method="tree-distill", loss_type="cispo", num_iterations=1)
    history = align(config, *loaded(policy), world(), tmp_path, chosen)
    assert any("search/best seen" in entry for entry in history)
    assert (tmp_path / "value_head.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_prior_and_groups_of_several_sizes(policy, tmp_path):
    chosen = ValuePriorConfig(prior=Ridge(), budget=Budget(4, 8))
    history = align(replace(CONFIG, method="v05", num_iterations=1), *loaded(policy), world(), tmp_path, chosen)
    assert any("prior/rollouts" in entry for entry in history)
    assert any("prior/error" in entry for entry in history)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_generations": 1}, "at least 2"),
        ({"minibatches": 3}, "do not divide"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"steps": 0}, "steps=0"),
        ({"beta": -1.0}, "beta"),
        ({"scale_rewards": "std"}, "scale_rewards"),
    ],
)
def test_settings_out_of_range(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        replace(CONFIG, **changes)


def test_a_chat_without_a_template_is_refused_by_the_warm_start(tmp_path):
    with pytest.raises(UserError, match="in steps"):
        warm_start(Countdown(style="chat"), tmp_path, START)


def test_samples(policy):
    model, tokenizer = loaded(policy)
    prompts = ["11+11=", "9", "97-13="]
    found = sample(model, tokenizer, prompts, 3, 8, seed=1)
    assert [len(own) for own in found] == [3, 3, 3]
    assert found == sample(model, tokenizer, prompts, 3, 8, seed=1) != sample(model, tokenizer, prompts, 3, 8, seed=2)
    greedy = sample(model, tokenizer, prompts, 2, 8, temperature=0)
    assert all(own[0] == own[1] for own in greedy)
    alone = sample(model, tokenizer, prompts[1:2], 1, 8, temperature=0)
    assert alone[0][0] == greedy[1][0]  # padding of others makes no difference
    assert all(own[-1] == tokenizer.eos_token_id or len(own) == 8 for rows in found for own in rows)
    assert ended([5, 1, 7], [1]) == [5, 1]
    with pytest.raises(UserError, match="empty"):
        sample(model, tokenizer, [""], 1, 4)
    with pytest.raises(UserError, match="can read"):
        sample(model, tokenizer, ["1"], 1, 1000)
    grades = solved(model, tokenizer, TASK, TASK.problems("train", 5), 4)
    assert grades.shape == (5, 4) and grades.dtype == bool


def longer(completions, wanted, **_):
    return [min(len(completion), want) / 10 for completion, want in zip(completions, wanted, strict=True)]


def test_a_file_of_prompts_and_a_function_of_ones_own(policy, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{n}+{n}=", "wanted": n % 5}) for n in range(10, 40)))
    ours = file_world(file, longer, (0.0, 1.0))
    assert len(ours.train) == 27 and len(ours.held_out) == 3
    history = align(replace(CONFIG, steps=2), *loaded(policy), ours, tmp_path / "run")
    assert "mean@4" in history[0]
    scores = judged(*loaded(policy), ours, 2, 4)
    assert scores.shape == (3, 2)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "0 rows"),
        ('{"prompt": "1"}', "1 rows"),
        ('{"prompt": ""}\n{"prompt": "1"}', "line 1"),
        ('{"prompt": "1"}\n{"question": "1"}', "line 2"),
        ("not json", "line 1"),
        ('{"prompt": []}', "line 1"),
        ('{"prompt": [{"role": "user"}]}', "line 1"),
        ('{"prompt": "1", "a": 1}\n{"prompt": "2"}', "different columns"),
    ],
)
def test_files_that_are_no_prompts(text, complaint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint):
        file_world(file, longer)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no task of that name"):
        file_world(tmp_path / "nothing", longer)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        file_world(tmp_path / "binary", longer)


def test_a_reward_that_fails_is_one_sentence(policy, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{n}="}) for n in range(12)))
    with pytest.raises(UserError, match="lambda> returned nan"):
        align(
            CONFIG,
            *loaded(policy),
            file_world(file, lambda completions, **_: [float("nan")] * len(completions)),
            tmp_path / "r",
        )
