"""The check of attention matching: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from lissom.evals.checks import attention_matching as study
from lissom.evals.checks.attention_matching import HIGHER_IS_BETTER
from lissom.evals.stats import paired_bootstrap
from lissom.report.checks import study_check
from lissom.report.rows import Claim, Result, Row

Records = Sequence[dict[str, Any]]
_UNITS = {
    "output_error": "relative",
    "mass_error": "nats",
    "nll": "nats",
    "kl": "nats",
    "top1": "share",
    "recalled": "share",
}


def _own(records: Records, ratio: float, arm: str) -> list[dict[str, Any]]:
    return [r for r in records if r["ratio"] == ratio and r["arm"] == arm]


def _arms(records: Records, ratio: float) -> list[str]:
    return list(dict.fromkeys(r["arm"] for r in records if r["ratio"] == ratio))


def _mean(own: Records, *keys: str) -> float:
    return float(np.mean([sum(r[key] for key in keys) for r in own]))


def result(run: study.Run) -> Result:
    """Every arm at every ratio; `baseline` is the best eviction method's figure at that ratio."""
    records, needles, size = run.records, run.needles, run.size
    rows = []
    for ratio in size.ratios:
        best = {}
        for metric in study.METRICS:
            means = [float(study.per_question(records, ratio, name, metric).mean()) for name in study.BASELINES]
            best[metric] = max(means) if metric in HIGHER_IS_BETTER else min(means)
        for arm in _arms(records, ratio):
            own = _own(records, ratio, arm)
            for metric, unit in _UNITS.items():
                values = study.per_question(records, ratio, arm, metric)
                mean = paired_bootstrap(values)
                pair = (mean.estimate, best[metric]) if metric in HIGHER_IS_BETTER else (best[metric], mean.estimate)
                times = pair[0] / pair[1] if pair[1] else None
                name = f"{ratio}/{arm}/{metric}"
                rows.append(Row(name, mean.estimate, unit, best[metric], times, mean.low, mean.high, len(values)))
            if arm != study.OURS:
                gap = study.against(records, ratio, arm, "nll")
                rows.append(
                    Row(
                        f"{ratio}/{arm}/nll above ours", -gap.estimate, "nats", 0.0, None, -gap.high, -gap.low, len(own)
                    )
                )
            rows.append(Row(f"{ratio}/{arm}/reading", _mean(own, "read_seconds"), "s", n=len(own)))
            rows.append(Row(f"{ratio}/{arm}/fit", _mean(own, "fit_seconds"), "s", n=len(own)))
            stored, full = _mean(own, "bytes"), _mean(own, "full_bytes")
            rows.append(Row(f"{ratio}/{arm}/bytes", stored, "bytes", full, full / stored, n=len(own)))
            off, untouched = _mean(own, "off_context"), _mean(own, "full_off_context")
            rows.append(Row(f"{ratio}/{arm}/off-context NLL", off, "nats", untouched, untouched / off, n=len(own)))
    for name in needles[0]["found"] if needles else ():
        found = [r["found"][name] for r in needles]
        full = float(np.mean([r["found"]["full"] for r in needles]))
        rows.append(Row(f"needles/{study.NEEDLE_RATIO}/{name}", float(np.mean(found)), "share", full, n=len(found)))
    claims = [Claim(words, "arXiv 2602.16284", verdict) for words, verdict in study.verdicts(records, size)]
    return Result("attention-matching", rows, claims)


def tables(run: study.Run) -> Iterator[Table]:
    """One table per ratio, then the needles."""
    records, needles, size = run.records, run.needles, run.size
    for ratio in size.ratios:
        table = Table(title=f"{ratio:.0%} of the entries", box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("method", min_width=14)
        for heading in ("out.err", "|ΔlogZ|", "NLL", "above ours [95 %]", "KL", "recall", "off-ctx", "fit s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm in _arms(records, ratio):
            own = _own(records, ratio, arm)
            mean = {m: float(study.per_question(records, ratio, arm, m).mean()) for m in study.METRICS}
            gap = study.against(records, ratio, arm, "nll")
            table.add_row(
                arm,
                f"{mean['output_error']:.3f}",
                f"{mean['mass_error']:.3f}",
                f"{mean['nll']:.3f}",
                "" if arm == study.OURS else f"{-gap.estimate:+.2f} [{-gap.high:+.2f},{-gap.low:+.2f}]",
                f"{mean['kl']:.3f}",
                f"{mean['recalled']:.0%}",
                f"{_mean(own, 'off_context') - _mean(own, 'full_off_context'):+.2f}",
                f"{_mean(own, 'fit_seconds'):.1f}",
            )
        known = [x for r in _own(records, ratio, study.OURS) for x in r["full_recalled"] if x is not None]
        ours = _own(records, ratio, study.OURS)
        table.caption = (
            f"ours stores {_mean(ours, 'bytes') / _mean(ours, 'full_bytes'):.1%} of the bytes; the full cache recalls "
            f"{np.mean(known):.0%} of the planted facts; off-ctx: ΔNLL of other text"
        )
        yield table
    if needles:
        table = Table(title=f"Needles found at {study.NEEDLE_RATIO:.0%}", box=SIMPLE)
        lengths = sorted({r["length"] for r in needles})
        for heading in ("method", *(f"{length} tokens" for length in lengths)):
            table.add_column(heading)
        for name in needles[0]["found"]:
            found = [[r["found"][name] for r in needles if r["length"] == length] for length in lengths]
            table.add_row(name, *(f"{sum(hits)}/{len(hits)}" for hits in found))
        yield table


CHECK = study_check(study, result, tables)
