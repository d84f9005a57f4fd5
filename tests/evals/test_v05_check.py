"""The study of V_0.5: the simulation's figures, arms that are what they say, and that a run is not made again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lissom.evals import policies
from lissom.evals.checks import v05 as study
from lissom.report.checks import check_of
from lissom.report.checks import v05 as report
from lissom.rl.value_prior import Fusion, Mean


@pytest.fixture(scope="module")
def run(journal):
    return study.run(None, study.QUICK, journal)


def test_a_run_has_every_arm_and_seed_and_is_not_made_again(run, journal, monkeypatch):
    assert {arm: len(records) for arm, records in run.trained.items()} == dict.fromkeys(study.QUICK.arms, 2)
    assert all(record["tokens"] >= 300 for records in run.trained.values() for record in records)
    assert all(record["rollouts"] >= 4 for record in run.trained[study.V05])
    monkeypatch.setattr(policies, "warm_start", lambda *given, **named: pytest.fail("made again"))
    monkeypatch.setattr(study, "_trained", lambda *given, **named: pytest.fail("made again"))
    assert study.run(None, study.QUICK, journal) == run


def test_the_simulation_is_what_is_known():
    errors, silent, budgets = study.simulate(60_000)
    mixed = errors[study.MIXED]
    assert mixed["mean"] == pytest.approx(0.125, abs=0.003)
    assert mixed["prior"] == pytest.approx(0.180, abs=0.006)
    assert mixed["fused"] == pytest.approx(0.063, abs=0.003)
    assert errors["error 0.1"]["prior"] < errors["error 0.1"]["fused"] < errors["error 0.1"]["mean"]
    assert errors["error 0.8"]["mean"] < errors["error 0.8"]["fused"]
    assert silent["mean"] == pytest.approx(0.54, abs=0.02) and silent["fused"] < 0.12
    assert budgets["two waves"] == pytest.approx((6.0, 0.0368), abs=0.15)
    assert budgets["16 for each"][1] < budgets["8 for each"][1] < budgets["4 for each"][1]


@pytest.mark.parametrize("arm", study.ARMS)
def test_arms_spend_about_as_many_rollouts(arm):
    config = study.config_of(study.DEFAULT, arm, study.DEFAULT.config)
    settings = study.settings_of(arm)
    budgeted = settings is not None and settings.budget is not None
    expected = config.prompts * (5.5 if budgeted else config.num_generations)
    assert expected == pytest.approx(256, rel=0.1)
    assert config.steps * expected == pytest.approx(study.DEFAULT.config.steps * 256, rel=0.1)
    assert config.num_generations == (16 if arm == study.GRPO_16 else 4)
    assert (settings is None) == (config.method == "grpo")
    if settings is not None and "V_0.5" in arm:
        assert isinstance(settings.baseline, Fusion)
    if arm == study.DAPO:
        assert isinstance(settings.baseline, Mean) and settings.drop_silent


def test_verdicts_follow_the_figures(run):
    def records(value):
        return [dict(record, mean=value + 0.01 * n, area=0.2) for n, record in enumerate(run.trained[study.V05])]

    made = replace(run, trained={study.GRPO_4: records(0.3), study.V05: records(0.5)})
    said = {words: verdict for words, _, verdict in study.verdicts(made)}
    assert [v for w, v in said.items() if "at the end" in w] == ["holds"]
    assert [v for w, v in said.items() if "over all tokens" in w] == ["weaker"]
    swapped = replace(run, trained={study.GRPO_4: records(0.5), study.V05: records(0.3)})
    assert [v for w, _, v in study.verdicts(swapped) if "at the end" in w] == ["does not hold"]
    assert [v for w, _, v in study.verdicts(run) if "whatever the prior" in w] == ["does not hold"]


def test_what_is_shown(run):
    names = {row.name for row in report.result(run).rows}
    assert f"simulation/{study.MIXED}/fused" in names and "budget/two waves/error" in names
    assert f"learning/{study.V05}/mean@K" in names
    assert all(np.isfinite(row.value) for row in report.result(run).rows)
    tables = list(report.tables(run))
    assert len(tables) == 3 and all(table.row_count for table in tables)
    assert check_of("v05").model is None
