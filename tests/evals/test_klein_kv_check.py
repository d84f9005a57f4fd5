"""The study of Klein KV: trained once, resumed, and what is shown of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import small_emoji

from lissom.diffusion.demo.model import Shape
from lissom.diffusion.klein_kv import KleinKV
from lissom.evals import editing, reference_speed
from lissom.evals.checks import klein_kv as study
from lissom.evals.judge import Judge
from lissom.evals.reference_speed import ARMS, CACHED, FULL, MASKED, THEIRS, WARM, Setting
from lissom.report.checks import check_of
from lissom.report.checks import klein_kv as report
from lissom.train.dit import DitConfig, Form

TRAINING = DitConfig(
    steps=4, batch_size=4, warmup_steps=1, precision="fp32", eval_steps=4, save_steps=4, logging_steps=4, sample_steps=9
)
SHAPE = Shape(size=16, patch=4, width=32, head=8, double=1, single=1)
SIZE = study.Size(
    Form(SHAPE, TRAINING), replace(TRAINING, steps=2), 2, 6, 2, 2, (Setting(1, 2), Setting(2, 2)), 2
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "load_emoji", lambda size: small_emoji())
        patch.setattr(study, "speeds", lambda *given, **named: reference_speed.speeds(*given, SHAPE, **named))
        journal = tmp_path_factory.mktemp("check") / "klein-kv.jsonl"
        first = study.run(None, SIZE, journal, lambda *seen: None)
        patch.setattr(editing, "train_dit", lambda *given: pytest.fail("trained again"))
        patch.setattr(study, "edits", lambda *given: pytest.fail("drawn again"))
        patch.setattr(study, "speeds", lambda *given, **named: pytest.fail("timed again"))
        again = study.run(None, SIZE, journal, lambda *seen: None)
        assert again.seconds == first.seconds and again.losses == first.losses
        return first


def test_a_run_has_every_arm(run):
    assert set(run.edits) == {(kind, arm) for kind in editing.KINDS for arm in study.EDITING}
    assert set(run.seconds) == set(SIZE.settings)
    for scores in run.edits.values():
        assert all(len(values) == 6 and np.isfinite(values).all() for values in scores.values())
    assert run.held[study.PLAIN] == 0 < run.held[study.INT8] < 0.4 * run.held[study.MADE]
    assert max(run.differences.values()) < 1e-4
    exact, packed = (run.edits["by a word", arm]["psnr"] for arm in (study.MADE, study.INT8))
    assert np.abs(exact - packed).max() < 0.5
    assert set(run.losses[study.PLAIN]) == {f"held_out_{count}" for count in range(5)}


def test_what_is_shown(run):
    result = report.result(run)
    rows = {row.name: row for row in result.rows}
    assert rows[f"time/1 reference, 2 steps/{FULL}"].ratio == 1
    assert rows[f"bound/2 references, 2 steps/{WARM}"].value > rows[f"bound/2 references, 2 steps/{CACHED}"].value > 1
    assert json.dumps(result.to_dict())
    assert result.claims[0].verdict == "holds" and len(result.claims) == 8
    assert len(list(report.tables(run))) == 4
    with Image.open(run.pictures) as sheet:  # four rows of each kind: two references, five arms, and what was wanted
        assert sheet.size[1] == 14 * 2 + 96 * 4 * 2 and sheet.size[0] > 96 * 8
    assert check_of("klein-kv") == report.CHECK


@pytest.mark.parametrize("count", [1, 3])
def test_every_arm_draws_the_same(count):
    pipeline = reference_speed._pipeline(SHAPE)
    inputs = reference_speed.inputs_of(pipeline, 2, count)
    wanted = reference_speed.sampled(pipeline, inputs, 3, MASKED)[-1]
    torch.testing.assert_close(reference_speed.sampled(pipeline, inputs, 3, THEIRS)[-1], wanted)
    assert not torch.allclose(reference_speed.sampled(pipeline, inputs, 3, FULL)[-1], wanted, atol=1e-6)
    with KleinKV()(pipeline) as report:
        found = reference_speed.sampled(pipeline, inputs, 3, FULL)[-1]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert report.reference_passes == 1 and len(report.store) == 1  # for all pictures
    works = reference_speed._works(pipeline, Setting(2, 3, count))
    assert tuple(works) == ARMS
    bounds = reference_speed.bounds(Setting(2, 3, count), SHAPE)
    assert bounds[WARM] > bounds[CACHED] and (bounds[CACHED] > bounds[THEIRS]) == (count > 1)


def test_scores_of_what_there_was_to_draw():
    emoji = small_emoji()
    torch.manual_seed(0)
    judge = Judge().eval()
    concepts = emoji.concepts(held_out=True).tolist()
    for kind in editing.KINDS.values():
        batch = editing.draw(emoji, kind, concepts, np.random.default_rng(0))
        found = editing.scores(batch.target, emoji, kind, judge, concepts)
        assert min(found["psnr"]) > 90 and min(found["ssim"]) > 0.999 and max(found["distance"]) < 1e-5
        assert min(found["recognised"]) == min(found["style"]) == 1
        worse = editing.scores(batch.target.roll(1, 0), emoji, kind, judge, concepts)
        assert np.mean(worse["psnr"]) < 20 and np.mean(worse["recognised"]) < 0.5


def test_claims_about_speed_compare_like_with_like():
    def arms(*faster):
        return {arm: [1 / own] * 3 for arm, own in zip(ARMS, (1.0, 1.0, *faster), strict=True)}

    seconds = {Setting(1, 4): arms(1.5, 1.5, 1.9), Setting(4, 4): arms(2.2, 2.2, 4.5),
               Setting(4, 4, 4): arms(2.2, 3.6, 4.5), Setting(4, 16): arms(3.5, 3.5, 4.5)}  # fmt: skip
    found = [(claim.verdict, claim.claim) for claim in report.speed_claims(seconds)]
    assert [verdict for verdict, _ in found] == ["holds", "holds", "holds", "weaker", "holds"]
    assert "here up to 2.20 times" in found[3][1] and "up to 3.60 times" in found[4][1]
    seconds[Setting(1, 4)] = arms(1.5, 1.2, 1.9)
    assert [claim.verdict for claim in report.speed_claims(seconds)][:3] == ["does not hold", "holds", "does not hold"]
