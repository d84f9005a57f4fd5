"""The check of the weighted h-transform: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import h_transform as study
from lissom.evals.stats import Interval, paired_bootstrap, signed, verdict
from lissom.report.checks import grid, model_or_none, study_check
from lissom.report.rows import Claim, Result, Row

SOURCE, OURS = "arXiv 2603.12057", "lissom"
_PUBLISHED = (study.SDEDIT, "DPS")  # which the paper compares with


def result(run: study.Run) -> Result:
    """Fidelity and quality of every arm, and the h-transform's frontiers against those of the other methods."""
    size = run.size
    facts = describe() | {
        "steps": size.form.config.steps, "pictures": size.pictures, "sampler": list(size.steps),
    }  # fmt: skip
    rows = []
    for (kind, sampler), arms in run.arms.items():
        for arm, own in arms.items():
            title = f"{kind}/{sampler}/{arm[0]}" + (f" {arm[1]:g}" if arm[0] in study.STRENGTHS else "")
            n = len(own.psnr)
            for name, values, unit in (("PSNR", own.psnr, "dB"), ("feature distance", own.distance, "")):
                found = paired_bootstrap(values)
                rows.append(Row(f"{title}/{name}", found.estimate, unit, None, None, found.low, found.high, n))
            rows.append(Row(f"{title}/kernel distance", float(run.points[kind, sampler][arm][0, 1]), "", n=n))
        n = len(next(iter(arms.values())).psnr)
        for ours, other in _pairs(run, kind, sampler):
            gap = run.ahead(kind, sampler, ours, other)
            title = f"{kind}/{sampler}/{ours}/frontier against {other}"
            rows.append(Row(title, gap.estimate, "share", 0.0, None, gap.low, gap.high, n))
    return Result("h-transform", rows, claims(run), facts)


def claims(run: study.Run) -> list[Claim]:
    """Where the h-transform is ahead of each other method, and where it is not."""
    gaps: dict[tuple[str, str, str], dict[str, Interval]] = {}
    for kind, sampler in run.arms:
        for ours, other in _pairs(run, kind, sampler):
            if other != study.H_FLOW:
                gaps.setdefault((sampler, ours, other), {})[kind] = run.ahead(kind, sampler, ours, other)
    found = []
    for (sampler, ours, other), own in gaps.items():
        sides = {
            "ahead on": [kind for kind, gap in own.items() if gap.low > 0],
            "behind on": [kind for kind, gap in own.items() if gap.high < 0],
            "undecided on": [kind for kind, gap in own.items() if gap.low <= 0 <= gap.high],
        }
        words = "; ".join(f"{side} {', '.join(kinds)}" for side, kinds in sides.items() if kinds)
        found.append(
            Claim(
                f"{sampler}: {ours} has a larger frontier than {other}: {words}",
                SOURCE if other in _PUBLISHED else OURS,
                verdict([-gap for gap in own.values()], 0.0, strict=True),
            )
        )
    return found


def tables(run: study.Run) -> Iterator[Table]:
    """For every kind of guide and sampler each arm's fidelity and quality, and the frontiers."""
    for (kind, sampler), arms in run.arms.items():
        steps = run.size.steps[sampler == study.STOCHASTIC]
        table = grid(
            f"{kind}: {sampler}, {steps} steps, {run.size.pictures} pictures", "", "strength", "PSNR",
            "feature distance", "kernel distance", numbers=True,
        )  # fmt: skip
        for arm, own in arms.items():
            fidelity, quality = run.points[kind, sampler][arm][0]
            strength = f"{arm[1]:g}" if arm[0] in study.STRENGTHS else ""
            table.add_row(arm[0], strength, f"{fidelity:.2f}", f"{own.distance.mean():.3f}", f"{quality:.4f}")
        table.caption = f"Some of the pictures: {run.pictures}"
        yield table
    others = [method for method in study.STRENGTHS if method != study.H_VP]
    table = grid(f"By how much more the frontier of {study.H_VP} dominates [95 %]", "", *others, numbers=True)
    for kind, sampler in run.arms:
        known = {other for ours, other in _pairs(run, kind, sampler) if ours == study.H_VP}
        cells = [
            signed(run.ahead(kind, sampler, study.H_VP, other), "+.0%") if other in known else "" for other in others
        ]
        table.add_row(f"{kind}, {sampler}", *cells)
    yield table


def _pairs(run: study.Run, kind: str, sampler: str) -> Iterator[tuple[str, str]]:
    """Of the h-transform's levels with each other method, and of `vp` with `flow`."""
    methods = list(dict.fromkeys(method for method, _ in run.arms[kind, sampler] if method in study.STRENGTHS))
    for ours, other in product((study.H_VP, study.H_FLOW), methods):
        if other not in (study.H_VP, ours):
            yield ours, other


CHECK = study_check(study, result, tables, model=None, load=model_or_none)
