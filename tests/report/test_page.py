from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from evolve.fake import FakeBench, fake_profile

from lissom.evals.peers import RECOMMENDED, Comparison, Figure
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


def test_the_table_has_the_front_within_the_accepted_loss(outcome):
    within = [m for m in outcome.front if m.loss.estimate <= outcome.max_loss]
    assert len(within) < len(outcome.front)
    assert table(outcome).row_count == len({id(m) for m in (outcome.base, *within)})
    assert table(outcome, everything=True).row_count == len(outcome.measured)


def test_other_runtimes_are_a_section_and_rows(outcome, tmp_path):
    figures = [
        Figure(name, label, 2, 1000, [first] * 3, [1 / rate] * 3, [1], 10**8)
        for name, label, rate, first in (
            (RECOMMENDED, RECOMMENDED, 300, 0.1), ("lissom", "lissom", 200, 0.2), ("flash", "llama.cpp", 100, 0.4),
        )
    ]  # fmt: skip
    compared = replace(outcome, peers=Comparison("m", figures, {"openvino int8": "no <openvino>"}, ["A note."]))
    html = page(compared, "command")
    section = html[html.index("Beside other runtimes") :].partition("</section>")[0]
    assert "llama.cpp" in section and "3.00×" in section and "4.00×" in section
    assert "Not compared: openvino int8: no &lt;openvino&gt;" in section and "A note." in section
    facts = result(compared).to_dict()
    rows = {row["name"]: row for row in facts["rows"]}
    assert rows["peers/threads 2/context 1000/lissom recommended against llama.cpp/decode"]["ratio"] == pytest.approx(3)
    assert facts["peers"]["failed"] == {"openvino int8": "no <openvino>"}
    assert "Beside other runtimes" not in page(outcome, "command")


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
