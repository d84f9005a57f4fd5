"""The check of the quantiser: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import quantize as study
from lissom.evals.stats import Interval, median_interval, signed
from lissom.report.checks import grid, study_check
from lissom.report.rows import Claim, Result, Row

SOURCE = "lissom"
_SHOWN = {"load": "from_pretrained", "use": "with a first pass"}


def result(run: study.Run) -> Result:
    """Every arm on all kinds of weights, ours against llama.cpp's of equal bytes, and loading; what was left out, and
    why, is in the facts."""
    rows = [row for kind in study.KINDS for row in _rows(run, kind)]
    for what in _SHOWN if run.loads else ():
        ours, theirs = (_seconds(run, name, what) for name in (study.MINE, study.THEIRS))
        for name, seconds in ((study.MINE, ours), (study.THEIRS, theirs)):
            values = seconds.estimate, "s", theirs.estimate, theirs.estimate / seconds.estimate
            rows.append(Row(f"loading/{name}/{what}", *values, seconds.low, seconds.high, run.size.loads))
        share = study.loading_ratio(run, what)
        values = share.estimate, "", 1.0, 1 / share.estimate
        rows.append(Row(f"loading/share/{what}", *values, share.low, share.high, run.size.loads))
    claims = [Claim(words, SOURCE, verdict) for words, verdict in study.verdicts(run)]
    return Result("quantize", rows, claims, describe() | {"left out": run.left_out})


def _rows(run: study.Run, kind: str) -> Iterator[Row]:
    base = _perplexity(run, kind, study.DENSE)
    for arm in run.arms:
        perplexity, bits, units = _perplexity(run, kind, arm), run.bits(kind, arm), len(run.nll(kind, arm))
        gap = run.against(kind, arm, study.DENSE)
        yield Row(f"{kind}/{arm}/perplexity", perplexity, "", base, base / perplexity, n=units)
        yield Row(f"{kind}/{arm}/NLL above fp32", gap.estimate, "nats", 0.0, None, gap.low, gap.high, units)
        yield Row(f"{kind}/{arm}/bits per weight", bits, "bits", 32.0, 32.0 / bits)
    for ours, theirs in run.pairs:
        gap, units = run.against(kind, ours, theirs), len(run.nll(kind, ours))
        name = f"{kind}/{ours} against {theirs}/NLL"
        yield Row(name, gap.estimate, "nats", 0.0, None, gap.low, gap.high, units)


def _perplexity(run: study.Run, kind: str, arm: str) -> float:
    return float(np.exp(run.nll(kind, arm).mean()))


def _seconds(run: study.Run, name: str, what: str) -> Interval:
    return median_interval([seconds[what] for seconds in run.loads[name]])


def tables(run: study.Run) -> Iterator[Table]:
    """One table for each kind of weights, one of ours against llama.cpp's, and one of loading."""
    for kind in study.KINDS:
        headings = "method", "bits", "perplexity", "NLL above fp32 [95 %]"
        table = grid(f"{kind.capitalize()} weights", *headings)
        for arm in run.arms:
            gap = "" if arm == study.DENSE else signed(run.against(kind, arm, study.DENSE))
            table.add_row(arm, f"{run.bits(kind, arm):.2f}", f"{_perplexity(run, kind, arm):.2f}", gap)
        yield table
    if run.pairs:
        table = grid("NLL above llama.cpp's [95 %]", "ours", "llama.cpp's", *study.KINDS)
        for pair in run.pairs:
            table.add_row(*pair, *(signed(run.against(kind, *pair)) for kind in study.KINDS))
        yield table
    if run.loads:
        table = grid("Loading, seconds [95 %]", "", *study.LOADED, "share")
        for what, words in _SHOWN.items():
            times = [_seconds(run, name, what) for name in study.LOADED]
            times.append(study.loading_ratio(run, what))
            table.add_row(words, *(f"{i.estimate:.2f} [{i.low:.2f}, {i.high:.2f}]" for i in times))
        yield table
    if run.left_out:
        table = grid("Left out", "method", "because")
        for name, reason in run.left_out.items():
            table.add_row(name, reason)
        yield table


CHECK = study_check(study, result, tables)
