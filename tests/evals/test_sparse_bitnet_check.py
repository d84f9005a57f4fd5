"""The study of Sparse-BitNet: arms that are paired, resuming, intervals, verdicts, and what is shown of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from tiny import study_material

from lissom.evals.checks import sparse_bitnet as study
from lissom.evals.stats import mean_interval
from lissom.report.checks import check_of
from lissom.report.checks import sparse_bitnet as report
from lissom.train import TrainConfig
from lissom.weights.sparse_bitnet import SparseBitNetConfig

SIZE = replace(
    study.QUICK,
    held_out=0.1,
    more_seeds=(2,),
    arms=(*study.MAIN, study.SHARES[0.5]),
    conversion=study.Conversion(
        SparseBitNetConfig(), TrainConfig(steps=2, context=32, batch_size=2, warmup_steps=1), 4
    ),
)


@pytest.fixture(scope="module")
def run(text, journal):
    return study.run(*study_material(), SIZE, journal)


def record(nll: float) -> dict:
    """What is known of an arm and seed: `nll` of new text, more of the end of the text."""
    history = [{"step": 1, "loss": 9.0, "zeros": 0.31}, {"step": 2, "loss": nll, "zeros": 0.4}]
    return {"nll": nll + 1, "history": history}


def made_up(**nll: list[float]) -> study.Run:
    """A run of arms by the names of this module's constants."""
    trained = {getattr(study, name): [record(value) for value in values] for name, values in nll.items()}
    return study.Run(replace(SIZE, arms=tuple(trained)), trained, {})


def test_a_run_has_every_arm_and_seed_and_is_not_made_again(run, journal, monkeypatch):
    assert {arm: len(records) for arm, records in run.trained.items()} == {
        arm: 3 if arm in study.MAIN else 2 for arm in SIZE.arms
    }
    assert all(np.isfinite(run.nll(arm)).all() for arm in SIZE.arms)
    assert len({record["nll"] for records in run.trained.values() for record in records}) == 14
    zeros = dict(run.measured(study.SPARSE, "zeros"))
    assert all(0.5 <= share < 0.6 for share in zeros.values())
    assert not run.measured(study.FLOAT, "zeros")
    monkeypatch.setattr(study, "train", lambda *given, **named: pytest.fail("made again"))
    seen = []
    assert study.run(*study_material(), SIZE, journal, lambda *at: seen.append(at)) == run
    assert seen[-1] == ("conversion", 2, 2)


def test_a_converted_model_is_left_behind_and_its_teacher_stays_as_it_is(text, tmp_path):
    model, tokenizer = study_material()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = study.run(model, tokenizer, replace(SIZE, arms=()), tmp_path / "journal.jsonl").converted
    assert all((before[name] == value).all() for name, value in model.state_dict().items())
    assert [len(found[state]) for state in (study.BEFORE, study.ONE_SHOT, study.AFTER)] == [4, 4, 4]
    assert found[study.AFTER] != found[study.ONE_SHOT] != found[study.BEFORE]
    assert any((folder / "model.safetensors").exists() for folder in tmp_path.glob("conversion-*"))


def test_arms_differ_in_what_they_are_about_and_in_nothing_else():
    dense, ternary = (study.config_of(arm, 1, SIZE) for arm in (study.FLOAT, study.TERNARY))
    assert (dense.weight_decay_until, ternary.weight_decay_until) == (None, 0.5)
    assert replace(dense, weight_decay_until=0.5) == ternary and dense.seed == 1
    assert study.config_of(study.SPARSE, 1, SIZE) == ternary
    assert study.config_of(study.FLOAT_SPARSE, 1, SIZE) == dense


def test_the_ratio_is_that_of_the_increases_of_perplexity():
    run = made_up(
        FLOAT=[3.0, 3.1, 2.9], FLOAT_SPARSE=[3.2, 3.3, 3.12], TERNARY=[3.3, 3.4, 3.2], SPARSE=[3.35, 3.44, 3.26]
    )
    increases = [np.exp(x) - 1 for x in ([0.2, 0.2, 0.22], [0.05, 0.04, 0.06])]
    np.testing.assert_allclose(run.increase(study.FLOAT_SPARSE, study.FLOAT), increases[0], rtol=1e-9)
    logs = np.log(increases[0] / increases[1])
    low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
    ratio = run.ratio
    np.testing.assert_allclose([ratio.estimate, ratio.low, ratio.high], np.exp([logs.mean(), low, high]), rtol=1e-9)
    words = dict(study.verdicts(run))
    claim = next(words for words in words if words.startswith("2:4 raises"))
    assert words[claim] == "holds" and f"{ratio.estimate:.2f} [{ratio.low:.2f}" in claim


def test_arms_are_paired_over_the_seeds_that_both_have():
    run = made_up(SPARSE=[3.0, 3.1, 9.0], MASK=[3.2, 3.4])
    found = run.above(study.MASK)
    wanted = stats.t.interval(0.95, 1, 0.25, 0.05)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.25, *wanted))


def test_text_that_is_seen_again_is_not_what_is_compared():
    run = made_up(SPARSE=[3.0, 3.1])
    np.testing.assert_allclose(run.nll(study.SPARSE), [3.0, 3.1])
    again = replace(run, size=replace(run.size, one_pass=False))
    np.testing.assert_allclose(again.nll(study.SPARSE), [4.0, 4.1])
    with pytest.raises(ValueError, match="seen twice"):
        study.train_arms(study_material()[0], replace(SIZE, config=replace(SIZE.config, steps=10**6)), None, None)


def test_a_null_is_said():
    run = made_up(
        FLOAT=[3.0, 3.1, 2.9], FLOAT_SPARSE=[3.02, 3.09, 2.95], TERNARY=[3.3, 3.4, 3.2], SPARSE=[3.5, 3.6, 3.4],
        MASK=[3.4, 3.5, 3.3], GRADIENT=[3.5, 3.6, 3.4],
    )  # fmt: skip
    assert run.ratio is None  # a mask that lowers the perplexity
    assert {verdict for _, verdict in study.verdicts(run)[:2]} == {"does not hold"}
    assert dict(study.verdicts(run))[
        "the gradient of all weights is at least as good as that of those that are left"
    ] == ("holds")


def test_a_larger_share_of_sparse_steps_is_compared_step_by_step():
    falling = [[3.5, 3.5], [3.4, 3.41], [3.3, 3.3], [3.2, 3.21]]
    for values, wanted in ((falling, "holds"), (falling[::-1], "does not hold")):
        run = made_up(SPARSE=values[-1])
        run.trained.update(
            {name: [record(nll) for nll in pair] for name, pair in zip(study.SHARES.values(), values, strict=False)}
        )
        assert dict(study.verdicts(run))["the larger the share of the steps with masks, the better"] == wanted


def test_intervals_of_few_units_are_students():
    values = np.array([0.1, 0.3, 0.2])
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 2, values.mean(), stats.sem(values)))
    with pytest.raises(ValueError, match="two units"):
        mean_interval(np.array([1.0]))


def test_what_is_shown(run):
    result = report.result(run).to_dict()
    json.dumps(result)
    names = {row["name"] for row in result["rows"]}
    assert {f"training/{arm}/perplexity" for arm in SIZE.arms} <= names
    assert f"training/{study.SHARES[0.5]}/NLL above 2:4" in names and "conversion/after/perplexity" in names
    assert result["tokens"] == 4 * 2 * 32
    assert len(list(report.tables(run))) == 4
    steps = [int(name.rsplit("/")[-1]) for name in names if name.startswith(f"over time/{study.TERNARY}/zeros")]
    assert all(one < other for one, other in pairwise(sorted(steps)))
    assert check_of("sparse-bitnet") is report.CHECK
