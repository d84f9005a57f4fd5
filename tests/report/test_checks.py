"""From the name of a check to its tables and its JSON."""

from __future__ import annotations

import json

import pytest
from rich.table import Table

import lissom
import lissom.report.checks
from lissom.cli.check import check
from lissom.errors import UserError
from lissom.report.checks import StudyCheck
from lissom.report.rows import Claim, Result, Row


@pytest.fixture
def asked(monkeypatch) -> list[object]:
    """What a study of the name `fake` is run with."""
    calls: list[object] = []

    def run(model, tokenizer, size, journal, progress):
        progress("counting", size, size)
        calls.append((model, tokenizer, size, str(journal)))
        return size

    def result(found: int) -> Result:
        return Result("fake", [Row("n", found, "")], [Claim("it counts", "here", "weaker")])

    sizes = {"small": 1, "default": 2, "paper": 3}
    fake = StudyCheck(
        ("counting",),
        sizes,
        run,
        result,
        lambda found: [Table("one")],
        load=lambda name: (f"model {name}", "tokenizer"),
    )
    monkeypatch.setattr(lissom.report.checks, "check_of", lambda method: fake)
    return calls


def call(**changes) -> None:
    check(
        **{"method": "fake", "model": "m", "small": False, "paper": False, "journal": None, "json_file": ""} | changes
    )


def test_sizes_and_journals(asked, tmp_path, capsys):
    call(small=True)
    call()
    call(paper=True, journal=tmp_path / "j")
    own = "lissom-check/fake.jsonl"
    found = [("model m", "tokenizer", 1, own), ("model m", "tokenizer", 2, own), ("model m", "tokenizer", 3)]
    assert asked == [*found[:2], (*found[2], str(tmp_path / "j"))]
    shown = capsys.readouterr().out
    assert shown.count("one") == 3 and shown.count("weaker: it counts (here)") == 3
    with pytest.raises(UserError, match="either"):
        call(small=True, paper=True)


def test_json_on_standard_output_stands_alone(asked, tmp_path, capsys):
    call(json_file="-")
    written = json.loads(capsys.readouterr().out)
    assert written["claims"] == [{"claim": "it counts", "source": "here", "verdict": "weaker"}]
    assert written["rows"][0]["value"] == 2
    call(json_file=str(tmp_path / "result.json"))
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == written["rows"]
    assert "weaker" in capsys.readouterr().out
