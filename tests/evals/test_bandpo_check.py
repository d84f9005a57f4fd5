"""The study of BandPO: what it measures, what it says of it, and that a run is not made again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lissom.evals import policies
from lissom.evals.checks import bandpo as study
from lissom.report.checks import bandpo as report
from lissom.report.checks import check_of
from lissom.rl.band.bandit import Bandit, play
from lissom.rl.band.config import FixedClip


@pytest.fixture(scope="module")
def run(journal):
    return study.run(None, study.QUICK, journal)


def test_a_run_has_every_arm_and_seed_and_is_not_made_again(run, journal, monkeypatch):
    assert {arm: len(records) for arm, records in run.trained.items()} == dict.fromkeys(study.QUICK.arms, 2)
    assert all(record["tokens"] >= 300 for records in run.trained.values() for record in records)
    assert run.rates[study.HIGHER] in study.QUICK.rates
    assert set(run.rates["tuning"][study.KL]) == set(study.QUICK.rates)
    monkeypatch.setattr(policies, "warm_start", lambda *given, **named: pytest.fail("made again"))
    monkeypatch.setattr(study, "_trained", lambda *given, **named: pytest.fail("made again"))
    again = study.run(None, study.QUICK, journal)
    assert again.trained == run.trained and again.rates == run.rates


def test_the_operator_is_exact(run):
    assert all(errors["equation"] < 1e-8 for errors in run.errors.values())
    assert set(run.errors) == {"kl", "tv", "chi-square", "reverse-kl", "hellinger"}
    assert all(len(seconds) == study.QUICK.rounds for seconds in run.seconds.values())


def test_with_one_inner_step_no_clip_does_anything(run):
    returns = {tuple(run.bandit(arm, "returns", 1)) for arm in study.BOUNDS}
    assert len(returns) == 1
    assert len({tuple(run.bandit(arm, "returns")) for arm in study.BOUNDS}) > 4


def test_the_bandit_is_learned():
    bandit = Bandit(contexts=16, actions=8, rank=2, iterations=60)
    begun, learned = (play(replace(bandit, iterations=n), FixedClip(0.2, 0.28), 0) for n in (1, 60))
    assert learned.returns > begun.returns + 0.1
    assert learned.entropy < begun.entropy
    assert 0 < learned.clipped < 1
    assert play(bandit, None, 3) == play(bandit, None, 3) != play(bandit, None, 4)


def test_verdicts_follow_the_figures(run):
    records = {
        arm: [
            dict(record, mean=value + 0.01 * n, best=0.5, entropy=1.0, rare=0.1)
            for n, record in enumerate(run.trained[arm])
        ]
        for arm, value in ((study.HIGHER, 0.2), (study.KL, 0.4))
    }
    made = replace(run, trained=records)
    said = {
        words.split(":")[1].split(" is ")[0].strip(): verdict
        for words, _, verdict in study.verdicts(made)
        if words.startswith("Countdown")
    }
    assert said["mean@K"] == "holds"
    assert said["pass@K"] == "weaker"  # equal
    swapped = replace(run, trained={study.HIGHER: records[study.KL], study.KL: records[study.HIGHER]})
    assert [v for w, _, v in study.verdicts(swapped) if "mean@K" in w] == ["does not hold"]


def test_what_is_shown(run):
    shown = report.result(run)
    names = {row.name for row in shown.rows}
    assert "learning/Band KL/mean@K" in names and "bandit/4 inner steps/no clip/return" in names
    assert "bounds/kl/equation" in names and "time/a fixed clip" in names
    assert all(row.value == row.value or "entropy" in row.name for row in shown.rows)
    tables = list(report.tables(run))
    assert len(tables) == 5 and all(table.row_count for table in tables)
    assert check_of("bandpo").model is None


def test_sizes():
    assert set(study.SMALL.arms) <= set(study.DEFAULT.arms) <= set(study.BOUNDS)
    assert np.isfinite(study.PAPER.config.token_budget)
