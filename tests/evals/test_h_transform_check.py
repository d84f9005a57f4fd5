"""The study of the h-transform: every arm draws, nothing is drawn twice, and frontiers are what they are called."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import small_emoji
from scipy.stats import multivariate_normal

from lissom.diffusion.demo import Emoji
from lissom.diffusion.demo.model import Shape
from lissom.evals import editing, frontier, guides
from lissom.evals.checks import h_transform as study
from lissom.evals.stats import Interval
from lissom.report.checks import check_of
from lissom.report.checks import h_transform as report
from lissom.train.dit import DitConfig, Form

TRAINING = DitConfig(
    steps=2, batch_size=4, warmup_steps=1, precision="fp32", eval_steps=4, save_steps=4, logging_steps=4, sample_steps=9
)
SIZE = study.Size(
    Form(Shape(size=16, patch=4, width=32, head=8, double=1, single=1), TRAINING), 12, (2, 3), ("blur",), judge_steps=2
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    emoji = small_emoji()
    emoji = Emoji(emoji.pictures, ("a", "b", "c", "d", "line"), *(emoji.names, emoji.categories, emoji.held_out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "load_emoji", lambda size: emoji)
        patch.setattr(study, "_DRAWS", 3)
        journal = tmp_path_factory.mktemp("check") / "h-transform.jsonl"
        first = study.run(None, SIZE, journal, lambda *seen: None)
        patch.setattr(editing, "train_dit", lambda *given: pytest.fail("trained again"))
        patch.setattr(study, "drawn", lambda *given: pytest.fail("drawn again"))
        again = study.run(None, SIZE, journal, lambda *seen: None)
        assert again.arms.keys() == first.arms.keys()
        return first


def test_every_arm_draws(run):
    assert set(run.arms) == {(kind, study.DETERMINISTIC) for kind in study.GUIDES} | {("blur", study.STOCHASTIC)}
    methods = {kind: {method for method, _ in run.arms[kind, study.DETERMINISTIC]} for kind in study.GUIDES}
    assert {"DPS", "FlowDPS", "replacement"} <= methods["missing region"] and "ILVR" not in methods["missing region"]
    assert not {"DPS", "FlowDPS", "replacement"} & methods["sketch"]
    for arms in run.arms.values():
        for own in arms.values():
            assert own.features.shape == (12, 128) and np.isfinite(own.psnr).all()
    blur = run.arms["blur", study.DETERMINISTIC]
    other = run.arms["blur", study.STOCHASTIC]
    assert not np.allclose(blur[study.H_VP, 3.0].psnr, other[study.H_VP, 3.0].psnr)
    nearest = [blur[study.H_VP, alpha].features for alpha in (1.0, 8.0)]
    guide = blur[study.GUIDE, 0.0].features
    assert np.abs(nearest[0] - guide).mean() < np.abs(nearest[1] - guide).mean()


def test_sheet_has_every_guide_and_method(run):
    with Image.open(run.pictures) as sheet:
        assert sheet.size[1] == 14 + 96 * 2 * len(guides.GUIDES)
        pixels = np.asarray(sheet.convert("RGB"))
    left = sheet.size[0] - 96 * (len(study.STRENGTHS) + 2)
    ilvr = left + 96 * (1 + list(study.STRENGTHS).index("ILVR"))
    row = 14 + 96 * 2 * list(guides.GUIDES).index("missing region")
    assert (pixels[row : row + 96, ilvr : ilvr + 96] == 255).all()  # which it has nothing for


def test_what_is_shown(run, monkeypatch):
    monkeypatch.setattr(study, "_DRAWS", 3)
    result = report.result(run)
    assert json.dumps(result.to_dict()) and all(row.n == 12 for row in result.rows)
    assert {claim.verdict for claim in result.claims} <= {"holds", "weaker", "does not hold"}
    assert len(list(report.tables(run))) == 8
    assert check_of("h-transform") == report.CHECK


def test_claims_name_where_it_is_ahead(run, monkeypatch):
    def ahead(self, kind, sampler, ours, other):
        sign = {"blur": -1, "sketch": 0}.get(kind, 1)
        return Interval(0.1 * sign, 0.1 * sign - 0.05, 0.1 * sign + 0.05)

    monkeypatch.setattr(study.Run, "ahead", ahead)
    words = next(claim.claim for claim in report.claims(run) if "than SDEdit" in claim.claim)
    assert words.startswith(
        f"{study.DETERMINISTIC}: {study.H_VP} has a larger frontier than SDEdit: ahead on low resolution"
    )
    assert "; behind on blur; undecided on sketch" in words


def test_guides_are_what_they_are_called():
    emoji = small_emoji()
    emoji = Emoji(emoji.pictures, ("a", "b", "c", "d", "line"), *(emoji.names, emoji.categories, emoji.held_out))
    found = dict(guides.requests(emoji, SIZE.kinds, SIZE.pictures))
    assert len(set(found["blur"].prompts)) == 12
    torch.testing.assert_close(found["blur"].guide, found["blur"].target)  # of one colour
    assert (found["another style"].guide - found["another style"].target).abs().amax((1, 2, 3)).min() > 0
    assert not any(prompt.startswith("line") for prompt in found["sketch"].prompts)
    hole = found["missing region"]
    assert (hole.guide[:, :, 4:12, 4:12] == 0).all() and torch.equal(hole.guide[..., :4], hole.target[..., :4])


def test_blur_is_that_of_a_normal_distribution():
    point = torch.zeros(1, 3, 25, 25)
    point[:, :, 12, 12] = 1
    grid = np.stack(np.meshgrid(range(-6, 7), range(-6, 7)), -1)
    wanted = multivariate_normal(cov=4 * np.eye(2)).pdf(grid)
    found = guides._blurred(point)[0, 0, 6:19, 6:19].double().numpy()
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=1e-6)


def test_area_and_kernel_distance():
    assert frontier.area([(2.0, 1.0), (1.0, 0.5), (1.5, 3.0)], (0.0, 2.0)) == pytest.approx(2 * 1 + 1 * 0.5)
    assert frontier.area([(-1.0, 0.0)], (0.0, 2.0)) == 0
    random = np.random.default_rng(0)
    one, other = random.standard_normal((6, 4)), random.standard_normal((5, 4))
    rows = np.asarray([4, 0, 3])

    def mean(left, right, same):
        values = [
            (x @ y / 4 + 1) ** 3 for i, x in enumerate(left) for j, y in enumerate(right) if not (same and i == j)
        ]
        return np.mean(values)

    wanted = mean(one[rows], one[rows], True) + mean(other, other, True) - 2 * mean(one[rows], other, False)
    assert frontier.KernelDistance(one, other).of(rows) == pytest.approx(wanted)
    same = [frontier.KernelDistance(*random.standard_normal((2, 40, 8))).of(np.arange(40)) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 200**0.5  # two samples of one distribution are at 0


def test_intervals_hold_their_estimates(run):
    for kind, sampler in run.arms:
        gap = run.ahead(kind, sampler, study.H_VP, study.SDEDIT)
        assert gap.low <= gap.estimate <= gap.high
        assert run.ahead(kind, sampler, study.SDEDIT, study.SDEDIT) == Interval(0.0, 0.0, 0.0)
