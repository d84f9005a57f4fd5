"""The study of NOBLE: arms that are what they say, steps to a target, resuming, verdicts, and what is shown of them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import study_material

from lissom.evals.checks import noble as study
from lissom.report.checks import check_of
from lissom.report.checks import noble as report
from lissom.train import TokenWindows
from lissom.weights.noble.apply import layers_of

SIZE = replace(study.QUICK, held_out=10, arms=study.ARMS)


@pytest.fixture(scope="module")
def run(text, journal):
    return study.run(*study_material(), SIZE, journal)


def test_a_run_has_every_arm_and_seed_and_is_not_made_again(run, text, journal, monkeypatch):
    assert {arm: len(records) for arm, records in run.trained.items()} == dict.fromkeys(study.ARMS, 2)
    assert all(np.isfinite(run.final(arm)).all() for arm in study.ARMS)
    assert len({record["held_out"][-1][1] for records in run.trained.values() for record in records}) == 18
    assert [entry[0] for entry in run.trained[study.COSNET][0]["held_out"]] == [2, 4, 6]
    assert run.rates[study.PLAIN] in SIZE.rates and len(run.rates["tuning"][study.COSNET]) == 2
    monkeypatch.setattr(study, "train", lambda *given, **named: pytest.fail("made again"))
    monkeypatch.setattr(study, "timed", lambda *given, **named: pytest.fail("made again"))
    again = study.run(*study_material(), SIZE, journal)
    assert again == run


def test_arms_are_what_they_say():
    models = {arm: study.build(arm, study.DEFAULT, 0) for arm in study.ARMS}
    counts = {arm: sum(p.numel() for p in model.parameters()) for arm, model in models.items()}
    plain = counts[study.PLAIN]
    assert counts[study.HALF] == plain and counts[study.COSNET] == counts[study.CENTRED]
    # 4 layers: four matrices of 128 x 128 and three of 128 x 384, each with r (in + out) + r^2 + 4 r
    assert counts[study.COSNET] - plain == 4 * (4 * (8 * 256 + 64 + 32) + 3 * (8 * 512 + 64 + 32))
    body = plain - 2 * 1024 * 128
    assert (counts[study.COSNET] - plain) / body < 0.1
    assert abs(counts[study.WIDER] - counts[study.COSNET]) < 1000
    flops = {arm: study.operations(model) for arm, model in models.items()}
    assert flops[study.WIDER] == pytest.approx(flops[study.COSNET], rel=2e-3)
    biased = dict(models[study.BIASED].named_parameters())
    assert {name.rpartition(".")[2] for name in biased if "q_proj" in name or "down_proj" in name} == {"weight", "bias"}
    main = {arm: models[arm].model.layers[1].mlp.up_proj.weight for arm in models}
    assert torch.equal(main[study.HALF], main[study.COSNET]) and torch.equal(main[study.COSNET], main[study.LINEAR])
    assert float(main[study.HALF].detach().std()) == pytest.approx(0.5 / 128**0.5, rel=0.02)
    assert torch.equal(main[study.PLAIN], main[study.BIASED])
    kinds = {
        arm: {layer.noble.settings.activation for layer in layers_of(model).values()} for arm, model in models.items()
    }
    assert kinds[study.LINEAR] == {"identity"} and kinds[study.GELU] == {"gelu-net"} and not kinds[study.WIDER]


def test_the_rate_is_constant_until_it_falls():
    assert study.constant_until(study.DEFAULT.config) == 960


def test_windows_are_held_out_all_over_the_text_and_none_is_lost():
    tokens = np.arange(25 * 4, dtype=np.uint16)
    kept, held = study.apart(TokenWindows(tokens, 4), 5, 2)
    firsts = [int(kept[i]["input_ids"][0]) // 4 for i in range(len(kept))]
    assert [int(held[i]["input_ids"][0]) // 4 for i in range(len(held))] == [4, 9, 14, 19]  # two batches of two
    assert firsts == [i for i in range(25) if i % 5 != 4]


def made_up(**final: list[float]) -> study.Run:
    """A run of arms by the names of this module's constants, each from 5 down to its last loss in ten measurements."""
    size = replace(SIZE, config=replace(SIZE.config, steps=100, decay_share=0.2, warmup_steps=1))
    trained = {
        getattr(study, name): [
            {"held_out": [[10 * i, float(loss)] for i, loss in enumerate(np.linspace(5, value, 10), 1)]}
            for value in ends
        ]
        for name, ends in final.items()
    }
    seconds = {arm: [2.0, 2.1, 2.2] if arm != study.PLAIN else [1.0, 1.05, 1.1] for arm in (*trained, study.EAGER)}
    ones = dict.fromkeys(seconds, 1)
    return study.Run(replace(size, arms=tuple(trained)), {}, trained, ones, seconds, ones, ones)


def test_intervals_are_students_over_paired_seeds():
    run = made_up(PLAIN=[3.0, 3.1, 3.2], COSNET=[2.9, 2.95, 3.0])
    gaps = np.array([-0.1, -0.15, -0.2])
    half = stats.t.ppf(0.975, 2) * gaps.std(ddof=1) / 3**0.5
    found = run.above(study.COSNET, study.PLAIN)
    np.testing.assert_allclose([found.estimate, found.low, found.high], [-0.15, -0.15 - half, -0.15 + half])
    steps, net = run.speedup(study.COSNET), run.net(study.COSNET)
    assert steps.estimate > 1 and net.estimate == pytest.approx(steps.estimate / 2)
    assert run.step_time(study.COSNET).estimate == pytest.approx(2)


@pytest.mark.parametrize(
    "cosnet,wider,expected",
    [
        ([2.0, 2.11, 2.19], [3.0, 3.1, 3.2], {"wider": "holds", "steps": "holds", "time": "does not hold"}),
        (
            [3.0, 3.1, 3.2],
            [2.9, 3.0, 3.1],
            {"wider": "does not hold", "steps": "does not hold", "time": "does not hold"},
        ),
    ],
)
def test_verdicts(cosnet, wider, expected):
    found = dict(study.verdicts(made_up(PLAIN=[3.0, 3.1, 3.2], COSNET=cosnet, WIDER=wider)))
    words = {"wider": "model wider", "steps": "fewer steps", "time": "less time"}
    for key, part in words.items():
        (verdict,) = [verdict for claim, verdict in found.items() if part in claim]
        assert verdict == expected[key], key


def test_what_is_shown_is_what_was_measured(run):
    result = report.result(run).to_dict()
    rows = {row["name"]: row for row in result["rows"]}
    assert rows[f"training/{study.COSNET}/NLL"]["value"] == pytest.approx(run.final(study.COSNET).mean())
    assert rows[f"step/{study.COSNET}/parameters"]["value"] == run.parameters[study.COSNET]
    assert rows[f"step/{study.EAGER}/kept"]["value"] > rows[f"step/{study.COSNET}/kept"]["value"]
    assert len(result["claims"]) == 8 and json.dumps(result)
    tables = list(report.tables(run))
    assert [table.row_count for table in tables] == [9, 10, 2]


def test_it_is_found_by_its_name():
    assert check_of("noble") is report.CHECK


def test_too_little_text_is_told(text):
    with pytest.raises(ValueError, match="too short"):
        study.texts(replace(SIZE, config=replace(SIZE.config, steps=1000)))


@pytest.mark.parametrize("size", ["SMALL", "DEFAULT", "PAPER"])
def test_sizes_have_ranks_that_fit(size):
    chosen = getattr(study, size)
    assert set(study.MAIN) <= set(chosen.arms) and len(chosen.seeds) >= 3 and len(chosen.rates) >= 3
    assert chosen.rank / chosen.model["hidden"] <= 1 / 16
