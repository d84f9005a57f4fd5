from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from evolve.fake import FakeBench, fake_profile

from lissom.evolve.optimize import optimize
from lissom.report.page import page
from lissom.report.results import result, table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def outcome():
    return optimize(FakeBench(), 0.04, 10, profile=fake_profile())


def test_every_recipe_is_on_the_page(outcome):
    html = page(outcome, "lissom generate --recipe <x>")
    written = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert "{{" not in written and "http" not in written
    assert "--recipe &lt;x&gt;" in html
    for m in outcome.measured:
        assert m.label in html
    assert "<script src" not in html  # nothing is fetched


def test_results_have_the_one_shape(outcome, tmp_path):
    result(outcome).write(str(tmp_path / "results.json"))
    facts = json.loads((tmp_path / "results.json").read_text())
    assert set(facts) >= {"name", "machine", "versions", "date", "rows", "best", "front", "device", "times"}
    assert set(facts["rows"][0]) == {"name", "value", "unit", "baseline", "ratio", "low", "high", "n"}
    decode = next(row for row in facts["rows"] if row["name"] == "bfloat16/decode")
    assert decode["ratio"] == pytest.approx(2.0)


def test_the_table_marks_the_best(outcome):
    assert table(outcome).row_count == len({id(m) for m in (outcome.base, *outcome.front)})
    assert table(outcome, everything=True).row_count == len(outcome.measured)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt install chromium)")
def test_a_browser_draws_the_plots_without_errors(outcome, tmp_path):
    file = tmp_path / "index.html"
    file.write_text(page(outcome, "command"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    command += [
        "--window-size=1280,900",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
        file.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.S)
    assert len(re.findall(r'<div id="plot\d"[^>]*class="[^"]*js-plotly-plot', body)) == 3
    sizes = re.findall(r'<div id="plot\d".*?class="main-svg"[^>]*?width="(\d+)', body, flags=re.S)
    assert len(sizes) == 3 and sizes[0] == sizes[1]  # side by side, so neither sticks out of its frame
    assert body.count('class="main-svg"') >= 3 and "accepted loss" in body
    assert "CONSOLE" not in done.stderr, done.stderr
