"""Priors against closed forms, calibration, and replays of rewards whose truth is known."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.errors import UserError
from lissom.rl.value_prior import (
    BatchMean,
    Constant,
    Context,
    Flipped,
    Fusion,
    GaussianProcess,
    Generalist,
    History,
    Mean,
    Neighbours,
    Outcome,
    PriorOnly,
    Ridge,
    ShrinkToBatch,
)
from lissom.rl.value_prior.calibration import calibrate
from lissom.rl.value_prior.priors import expected
from lissom.rl.value_prior.replay import Logged, read_log, replay


def outcomes(count=60, dimensions=5, noise=0.05, seed=0):
    random = np.random.default_rng(seed)
    x, slope = random.normal(size=(count, dimensions)), random.normal(size=dimensions) * 0.2
    y = 0.5 + x @ slope + noise * random.normal(size=count)
    context = [Outcome(f"p{n}", x[n], float(y[n]), int(random.integers(1, 9)), n // 12) for n in range(count)]
    fresh = random.normal(size=(20, dimensions))
    return context, fresh, 0.5 + fresh @ slope


def test_ridge_against_normal_equations():
    context, fresh, _ = outcomes()
    x, y = np.stack([o.features for o in context]), np.array([o.mean for o in context])
    w = np.array([o.size for o in context], float)
    found = Ridge(penalty=0.3).predict([""] * 20, fresh, context)
    middle, deviation = x.mean(0), x.std(0) + 1e-6 * (1 + np.abs(x).max())
    scaled = (x - middle) / deviation
    roots = np.sqrt(w / w.mean())[:, None]
    design = np.vstack([scaled * roots, np.sqrt(0.3 * len(y)) * np.eye(5)])
    mean = np.average(y, weights=w)
    target = np.concatenate([(y - mean) * roots[:, 0], np.zeros(5)])
    slope = np.linalg.lstsq(design, target, rcond=None)[0]
    assert np.allclose(found, mean + (fresh - middle) / deviation @ slope)


def test_neighbours_against_a_loop():
    context, fresh, _ = outcomes()
    x = np.stack([o.features for o in context])
    deviation = x.std(0) + 1e-6 * (1 + np.abs(x).max())
    found = Neighbours(count=7).predict([""] * 20, fresh, context)
    for own, value in zip(fresh, found, strict=True):
        order = sorted(context, key=lambda o: np.linalg.norm((own - o.features) / deviation))[:7]
        assert value == pytest.approx(sum(o.mean * o.size for o in order) / sum(o.size for o in order))


@pytest.mark.parametrize("prior", [GaussianProcess(), Ridge(), Neighbours(8)], ids=str)
def test_what_depends_on_features_is_learned(prior):
    context, fresh, truth = outcomes(count=200)
    found = prior.predict([""] * 20, fresh, context)
    assert ((found - truth) ** 2).mean() < 0.5 * truth.var()


def test_a_gaussian_process_between_few_points_is_what_it_should_be():
    """Two outcomes that agree, and a prompt like them: near what they have; one far away: the mean of all."""
    near, far = np.array([[0.0, 0.0], [0.1, 0.0], [3.0, 3.0], [3.1, 3.0]]), np.array([[0.05, 0.0], [40.0, -40.0]])
    context = [Outcome("", x, y, 4, 0) for x, y in zip(near, (0.9, 0.9, 0.1, 0.1), strict=True)]
    found = GaussianProcess().predict(["", ""], far, context)
    assert found[0] > 0.6
    assert found[1] == pytest.approx(0.5, abs=0.02)


def test_history():
    context = [Outcome("a", None, 1.0, 4, 0), Outcome("b", None, 0.0, 4, 0), Outcome("a", None, 0.0, 4, 10)]
    found = History(decay=0.9).predict(["a", "b", "c"], None, context)
    middle, old = 4 / 12, 4 * 0.9**10
    assert found[2] == pytest.approx(middle)
    assert found[0] == pytest.approx((middle + old * 1.0 + 4 * 0.0) / (1 + old + 4))
    assert found[1] == pytest.approx((middle + old * 0.0) / (1 + old))
    assert History().predict(["a"], None, []) is None
    assert BatchMean().predict(["x", "y"], None, context).tolist() == [middle, middle]


def test_a_window_forgets_and_a_context_is_kept_as_text():
    context = Context(3)
    for step in range(6):
        context.add([Outcome(f"p{step}", np.array([step, 0.5]), 0.1 * step, 4, step)])
    assert [o.step for o in context.outcomes] == [3, 4, 5]
    again = Context(3)
    again.load(context.to_json())
    assert again.to_json() == context.to_json()
    assert np.array_equal(again.outcomes[0].features, [3, 0.5])


def test_models_of_ones_own_and_adversaries():
    context = Context(8)
    context.add([Outcome("q", None, -1.0, 4, 0), Outcome("r", None, 1.0, 4, 1)])
    asked = []

    def model(prompts, pairs):
        asked.append((prompts, pairs))
        return [0.25] * len(prompts)

    prior = Generalist(model, -1.0, 1.0)
    assert expected(prior, ["a", "b"], None, context, -1.0, 1.0).tolist() == [-0.5, -0.5]
    assert asked == [(["a", "b"], [("q", 0.0), ("r", 1.0)])]
    assert expected(Flipped(prior, -1.0, 1.0), ["a"], None, context, -1.0, 1.0).tolist() == [0.5]
    assert expected(Constant(7.0), ["a"], None, context, -1.0, 1.0).tolist() == [1.0]  # within the range
    for answer in ([0.5], [0.5, 2.0], [0.5, float("nan")]):
        with pytest.raises(UserError, match="probability"):
            expected(Generalist(lambda p, c, a=answer: a, 0, 1), ["a", "b"], None, context, 0.0, 1.0)
    with pytest.raises(UserError, match="finite"):
        expected(Constant(float("nan")), ["a"], None, context, 0.0, 1.0)


def test_calibration_of_a_prior_that_is_right_and_of_one_that_is_off():
    random = np.random.default_rng(0)
    truth = random.random(4000)
    rewards = (random.random((4000, 8)) < truth[:, None]).astype(float)
    facts = (rewards.mean(1), [8] * 4000, (rewards**2).mean(1), np.repeat(np.arange(4), 1000))
    right = calibrate(truth, *facts, 0.0, 1.0)
    assert right.error == pytest.approx(0, abs=0.002)
    assert right.bias == pytest.approx(0, abs=0.01)
    assert right.brier == pytest.approx(float((truth * (1 - truth)).mean()), abs=0.01)
    assert right.correlation > 0.85 and len(right.by_step) == 4
    assert all(abs(own.expected - own.found) < 0.03 and own.prompts == 400 for own in right.reliability)
    off = calibrate(truth * 0 + 0.8, *facts, 0.0, 1.0)
    assert off.error == pytest.approx(float(((0.8 - truth) ** 2).mean()), abs=0.005)
    assert off.bias == pytest.approx(0.3, abs=0.01) and off.correlation == 0
    assert off.accepted < right.accepted
    with pytest.raises(UserError):
        calibrate([], [], [], [], [], 0.0, 1.0)


def log_of(steps=30, prompts=20, size=16, seed=0):
    """Prompts come again and again, with chances that stay what they are."""
    random = np.random.default_rng(seed)
    chances = random.beta(0.5, 0.5, prompts)
    return [
        Logged(step, f"p{n}", tuple((random.random(size) < chances[n]).astype(float)))
        for step in range(steps)
        for n in range(prompts)
    ], chances


def test_a_replay_knows_the_errors_of_baselines():
    log, chances = log_of(steps=100)
    noise = float((chances * (1 - chances)).mean())
    assert replay(log, Mean(), size=4).error == pytest.approx(noise / 4, rel=0.15)
    assert replay(log, PriorOnly(), size=4).error == pytest.approx(float(((chances - 0.5) ** 2).mean()), rel=0.1)
    known = replay(log, PriorOnly(), History(), size=4)
    assert known.error < 0.3 * noise / 4 and known.known == 0.99 and known.prompts == 2000
    fused = replay(log, Fusion(), History(), size=4)
    assert fused.error < 0.5 * noise / 4
    assert fused.silent < 0.2 < replay(log, Mean(), size=4).silent
    assert replay(log, ShrinkToBatch(), size=4).error < noise / 4


@given(st.integers(0, 1000))
def test_a_replay_is_the_same_for_a_seed(seed):
    log, _ = log_of(steps=2, prompts=3, seed=seed)
    assert replay(log, Mean(), seed=seed) == replay(log, Mean(), seed=seed)


def test_logs(tmp_path):
    log, _ = log_of(steps=3, prompts=4, size=6)
    file = tmp_path / "log.jsonl"
    file.write_text("\n".join(json.dumps({"step": r.step, "prompt": r.prompt, "rewards": r.rewards}) for r in log))
    assert read_log(file) == log
    folder = tmp_path / "completions"
    folder.mkdir()
    for step in range(3):
        rows = [(r.step, r.prompt, "x", reward, 0.0) for r in log if r.step == step for reward in r.rewards]
        pandas.DataFrame(rows, columns=["step", "prompt", "completion", "correct", "advantage"]).to_parquet(
            folder / f"completions_{step:05d}.parquet"
        )
    assert read_log(folder) == read_log(folder, "correct") == log
    with pytest.raises(UserError, match="no rewards called dense"):
        read_log(folder, "dense")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no rewards"),
        ("{}", "line 1"),
        ('{"step": 0, "prompt": "a", "rewards": ["x"]}', "line 1"),
        ("no", "line 1"),
    ],
)
def test_what_is_no_log(text, complaint, tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_log(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path / "nothing.jsonl")


def test_what_cannot_be_replayed():
    log, _ = log_of(steps=1, prompts=2, size=5)
    with pytest.raises(UserError, match="6 rewards"):
        replay(log, Mean(), size=4)
    with pytest.raises(UserError, match="features"):
        replay(log, Fusion(), Ridge(), size=2)
    assert torch.get_default_dtype() == torch.float32
