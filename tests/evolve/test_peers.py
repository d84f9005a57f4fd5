"""The comparison that `lissom optimize` keeps."""

from __future__ import annotations

import json

from fake_peers import COUNTING, REFUSING, FakePeers, tiny_file

from lissom.evals.journal import Journal
from lissom.evolve import peers as beside
from lissom.recipes import Recipe


class Bench:
    """What a comparison asks of the real one."""

    def __init__(self, model: str, journal: Journal) -> None:
        self.base, self.journal, self.tokens = Recipe(model=model), journal, 8

    def identity(self, kind: str, number: int, recipe: Recipe, circumstances: object) -> str:
        return json.dumps([kind, number, recipe.label, circumstances])


def test_a_comparison_is_kept_until_a_runtime_was_upgraded_or_runs_by_now(tmp_path, monkeypatch):
    peers = FakePeers(tmp_path / "peers", monkeypatch)
    arms = [peers.runtime("steady", COUNTING), peers.runtime("shaky", REFUSING), peers.runtime("absent", REFUSING)]
    peers.install("steady", "1.0")
    peers.install("shaky", "1.0")
    monkeypatch.setattr(beside, "arms", lambda bench, best, quick: arms)
    measured, compare = [], beside.compare

    def counted(model, contexts, threads, chosen, size, **how):
        measured.append((len(chosen), size))
        found = compare(model, contexts, threads, chosen, size, **how)
        found.hurried |= busy and size == beside.QUICK
        return found

    monkeypatch.setattr(beside, "compare", counted)
    model, size, busy = tiny_file(tmp_path), beside.QUICK, False

    def run(deadline: float = float("inf")):
        measured.clear()
        bench = Bench(model, Journal(tmp_path / "journal.jsonl"))
        return {figure.arm for figure in beside.beside_peers(bench, bench.base, deadline, quick=True).figures}

    assert run() == {"steady"} and measured == [(3, size)]
    assert run() == {"steady"} and measured == [(1, size.least)]  # the one that failed was tried, and failed again
    peers.runtime("shaky", COUNTING)
    assert run(deadline=0) == {"steady"}  # no time to find out
    busy = True
    assert run() == {"steady"}  # nor for all of it: what was whole stays
    busy = False
    assert run() == {"steady", "shaky"} and measured == [(1, size.least), (3, size)]
    assert run() == {"steady", "shaky"} and not measured
    peers.install("steady", "2.0")
    assert run() == {"steady", "shaky"} and measured == [(3, size)]
    peers.runtime("absent", COUNTING)
    peers.install("absent", "1.0")
    assert run() == {"steady", "shaky", "absent"} and measured == [(3, size)]
