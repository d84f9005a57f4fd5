"""The study of tree-search distillation: variants that are what they say, a run that is not made again, verdicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lissom.evals import policies
from lissom.evals.checks import tree_distill as study
from lissom.report.checks import check_of
from lissom.report.checks import tree_distill as report
from lissom.rl.tasks import Countdown
from lissom.rl.tree_search import SearchConfig, SymbolicCountdown, Tree, TreeSearch, root_of


@pytest.fixture(scope="module")
def run(journal):
    return study.run(None, study.QUICK, journal)


def test_a_run_has_every_arm_and_seed_and_is_not_made_again(run, journal, monkeypatch):
    assert {arm: len(records) for arm, records in run.trained.items()} == dict.fromkeys(study.QUICK.arms, 2)
    assert all(record["tokens"] >= 2000 for records in run.trained.values() for record in records)
    assert len(run.lift["searched"]) == study.QUICK.lifted and run.lift["samples"] >= 1
    monkeypatch.setattr(policies, "warm_start", lambda *given, **named: pytest.fail("made again"))
    for name in ("_trained", "_lift", "searched", "_sampled"):
        monkeypatch.setattr(study, name, lambda *given, **named: pytest.fail("made again"))
    assert study.run(None, study.QUICK, journal) == run


def test_defects_are_what_they_say():
    roots = [root_of(problem) for problem in Countdown(numbers=4).problems("train", 6)]
    config = SearchConfig(simulations=40, wave=8)
    kinds = (Tree, study.CountedTwice, study.VirtualVisits)
    plain, twice, virtual = (TreeSearch(SymbolicCountdown(), config, kind)(roots) for kind in kinds)

    def worths(trees):
        return [abs(n.total / n.visits) for tree in trees for n in tree.root.below() if n.visits and n.reward is None]

    assert max(worths(plain)) <= 1 < max(worths(twice))  # outside of the range of rewards
    tree = virtual[0]
    child = tree.root.children[0]
    child.visits, child.total, child.best = 3, -2.7, -0.9
    before = [kind.score(tree, tree.root, child) for kind in (Tree, study.VirtualVisits)]
    child.flying = 2
    after = [kind.score(tree, tree.root, child) for kind in (Tree, study.VirtualVisits)]
    assert before[0] == before[1]
    q = [score - 0.5 * child.prior * np.sqrt(tree.root.visits - 1) / (1 + 5) for score in after]
    assert q[0] == pytest.approx((-2.7 - 2) / 5) and q[1] == pytest.approx(-2.7 / 5)  # the latter above -0.9


def test_rewards_that_say_only_right_or_wrong_find_more():
    problems = Countdown(numbers=4).problems("train", 20)
    dense = study.searched(problems, 200, *study.VARIANTS["published recipe"])
    sparse = study.searched(problems, 200, *study.VARIANTS["rewards of 1 and -1"])
    closed = study.searched(problems, 200, *study.VARIANTS["those, and left alone"])
    assert sparse["best"] > dense["visits"]
    assert closed["seen"] >= sparse["seen"]
    assert all(0 <= found["visits"] <= found["best"] <= 1 for found in (dense, sparse, closed))


def test_verdicts_follow_the_figures(run):
    def records(value):
        return [dict(record, mean=value + 0.01 * n, before=0.1) for n, record in enumerate(run.trained[study.SEARCHED])]

    made = replace(run, trained={study.SEARCHED: records(0.5), study.BEST_OF: records(0.3), study.CISPO: records(0.6)})
    said = {words: verdict for words, _, verdict in study.verdicts(made)}
    assert [v for w, v in said.items() if "rises" in w] == ["holds"]
    assert [v for w, v in said.items() if study.BEST_OF in w] == ["holds"]
    assert [v for w, v in said.items() if study.CISPO in w] == ["does not hold"]


def test_what_is_shown(run):
    names = {row.name for row in report.result(run).rows}
    assert "puzzle/published recipe/16/seen" in names and f"learning/{study.BEST_OF}/mean@K" in names
    assert all(np.isfinite(row.value) for row in report.result(run).rows)
    tables = list(report.tables(run))
    assert len(tables) == 3 and all(table.row_count for table in tables)
    assert check_of("tree-distill").model is None
