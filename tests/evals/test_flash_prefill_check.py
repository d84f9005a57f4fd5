"""The study of FlashPrefill: its tasks, what it measures, resuming, verdicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import VOCAB, tiny_model

from lissom import sparse_prefill
from lissom.evals import retrieval
from lissom.evals.checks import flash_prefill as study
from lissom.evals.checks.flash_prefill import DENSE, FLASH, MANUAL, NATIVE, OWN, ROWS, SDPA, STRICT
from lissom.evals.retrieval import TASKS, judged, trials
from lissom.report.checks import check_of
from lissom.report.checks import flash_prefill as report

TINY = study.Size(
    texts=((MANUAL, 400, 2),), arms=(DENSE, FLASH, "forced"), tasks=((400, 2),), copies=((800, 1),), task_arms=(FLASH,),
    times=(300,), rounds=2, dtypes=("float32", "bfloat16"), synthetic=(300, 600),
)  # fmt: skip


class Letters:
    """A tokenizer of bytes that gives lists, as those of real models do where nothing else is asked for."""

    def __call__(self, text, **options):
        return {"input_ids": [1 + byte % (VOCAB - 1) for byte in text.encode()]}


@pytest.mark.parametrize("task", TASKS)
def test_trials(task):
    one, again = (list(trials(Letters(), task, [800, 1000], [2, 1])) for _ in range(2))
    assert [len(trial.ids) for trial in one] == [800, 800, 1000]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0].ids, one[1].ids)
    for trial in one:
        places, before = trial.wanted.tolist(), trial.ids[: trial.wanted[0]].tolist()
        breaks = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
        assert len(breaks) == (task == "variables")  # its two hops stand in two places
        for first, last in pairwise([0, *breaks, len(places)]):
            part = trial.ids[trial.wanted[first:last]].tolist()
            found = [i for i in range(len(before)) if before[i : i + len(part)] == part]
            assert found and found[0] < 0.9 * len(before), "the answer stands in the text before"
        assert trial.items * trial.each == len(trial.wanted) and places[-1] == len(trial.ids) - 1


def test_judging():
    (trial,) = trials(Letters(), "copy", [800], [1])

    class Knows:
        device = torch.device("cpu")

        def __call__(self, ids, use_cache, logits_to_keep):
            following = ids[0, logits_to_keep + 1]
            following[3] = 0  # is wrong once, in the first item
            logits = 20.0 * torch.nn.functional.one_hot(following, VOCAB)[None].float()
            return type("Output", (), {"logits": logits})

    right, nll = judged(Knows(), trial)
    assert right == [False] + [True] * (trial.items - 1)
    assert nll == pytest.approx(20 / len(trial.wanted), rel=0.01)
    with pytest.raises(ValueError, match="twice"):
        next(trials(Letters(), "copy", [500], [1]))


def test_what_is_made_up_attends_as_planted():
    query, key, value = study.planted(4096, 4, 2, 64)
    assert query.shape == (1, 4, 4096, 64) and key.shape == value.shape == (1, 2, 4096, 64)
    dense, sparse = (sparse_prefill(query, key, value, alpha=alpha) for alpha in (0.0, 0.1))
    tiles = 32
    assert int(sparse.selected.sum()) < 0.7 * 4 * tiles * (tiles + 1) / 2
    left_out = -torch.expm1(sparse.lse - dense.lse)
    random = sparse_prefill(query, key, value, alpha=2.0)
    assert float(left_out.mean()) < 0.3 * float(-torch.expm1(random.lse - dense.lse).mean())


def test_it_is_measured_and_resumed(tmp_path, monkeypatch):
    model, stages = tiny_model("llama"), []
    found = study.run(model, Letters(), TINY, tmp_path / "j", lambda *given: stages.append(given))
    assert {stage for stage, _, _ in stages} == set(study.STAGES) and found.layers == 3
    assert found.texts.keys() == {(MANUAL, 400, arm) for arm in TINY.arms}
    assert found.texts[MANUAL, 400, DENSE]["density"] == 1.0
    assert found.tasks.keys() == {
        (task, 800 if task == "copy" else 400, arm) for task in TASKS for arm in (DENSE, FLASH, FLASH + STRICT)
    }
    assert len(found.tasks["needle", 400, DENSE]["right"]) == 2
    for arm, times in (
        (arm, found.times["float32", 300, arm]) for arm in (SDPA, OWN, FLASH, ROWS, f"{NATIVE}, {FLASH}")
    ):
        assert len(times["whole"]) == 2 and all(
            0 < a < b for a, b in zip(times["attention"], times["whole"], strict=True)
        )
        assert (min(times["choosing"]) > 0) == (arm != SDPA)
    assert found.synthetic.keys() == {(entries, arm) for entries in (300, 600) for arm in study.SYNTHETIC}
    assert model.config._attn_implementation == "sdpa" and model.dtype == torch.float32
    for name in ("_text", "_read", "judged", "_synthetic"):
        monkeypatch.setattr(study, name, lambda *given: pytest.fail("it is measured again"))
    assert study.run(model, Letters(), TINY, tmp_path / "j") == found
    result = report.result(found)
    assert {claim.verdict for claim in result.claims} <= {"holds", "weaker", "does not hold"}
    assert len(list(report.tables(found))) == 5 and all(row.value == row.value for row in result.rows)


def test_thresholds_are_chosen_once_for_all_texts(tmp_path, monkeypatch):
    calls = []

    def calibrated(self, model, tokenizer, budget):
        calls.append((self.selection, budget))
        return replace(self, alpha=2.0)

    monkeypatch.setattr(study.FlashPrefill, "calibrated", calibrated)
    size = replace(TINY, texts=((MANUAL, 400, 2), (MANUAL, 450, 1)), arms=(DENSE, "forced", f"{ROWS}, 5% by head"))
    size = replace(size, tasks=(), copies=(), times=(), synthetic=())
    found = study.run(tiny_model("llama"), Letters(), size, tmp_path / "j")
    assert calls == [(ROWS, 0.05)]
    for tokens in (400, 450):
        ours, wanted = (found.texts[MANUAL, tokens, arm] for arm in (f"{ROWS}, 5% by head", "forced"))
        assert all(ours[what] == wanted[what] for what in ("nll", "density"))


def made_up(attention: float, whole: float, nll: float, right: int) -> study.Run:
    """What is claimed depends on: seconds of ours where SDPA takes 6 of 10, NLL above dense, items of 50."""
    run = study.Run(study.DEFAULT, 30)
    stretches = [3.0 + 0.1 * i for i in range(20)]
    run.texts = {(MANUAL, 8192, DENSE): {"nll": stretches, "density": 1.0},
                 (MANUAL, 8192, FLASH): {"nll": [x + nll for x in stretches], "density": 0.3}}  # fmt: skip
    run.tasks = {("needle", 2048, arm): {"right": [True] * n + [False] * (50 - n), "nll": [0.1], "density": 1.0}
                 for arm, n in ((DENSE, 50), (FLASH, right), (FLASH + STRICT, 20))}  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        times = {SDPA: (6.0, 10.0), OWN: (2.2 * attention, 9.0), FLASH: (attention, whole)}
        times[f"{NATIVE}, {FLASH}"] = times[FLASH]
        for arm, (a, b) in times.items():
            parts = {"attention": [a] * 3, "whole": [b] * 3, "choosing": [0.04 * a] * 3, "density": [0.3] * 3}
            run.times[dtype, 8192, arm] = parts
    seconds = {SDPA: 2.4, OWN: 1.0, FLASH: 0.4, "forced": 0.25}
    run.synthetic = {(8192, arm): {"seconds": [s] * 3, "density": 0.2} for arm, s in seconds.items()}
    return run


def test_verdicts():
    good = {claim.claim: claim.verdict for claim in report.result(made_up(1.0, 4.0, 0.02, 49)).claims}
    (words,) = (words for words, verdict in good.items() if verdict != "holds")
    assert len(good) == 13 and words.startswith(f"needle, {FLASH}{STRICT}:") and "-60.0%" in words
    bad = report.result(made_up(1.5, 7.0, 0.04, 48)).claims
    failed = [claim.claim.split(":")[0] for claim in bad if claim.verdict == "does not hold"]
    assert len(failed) == 6 and failed[0].startswith("8192 tokens, float32") and "needle, flashprefill" in failed
    few = made_up(1.0, 4.0, 0.02, 49)
    for found in few.tasks.values():
        found["right"].pop()
    assert not any(claim.claim.startswith("needle") for claim in report.result(few).claims)


def test_it_is_installed():
    assert check_of("flash-prefill") is report.CHECK
    assert study.DEFAULT.arms == (*study.ARMS, *study.BUDGETS)
    assert retrieval.TASKS.keys() == {"needle", "variables", "copy"}
