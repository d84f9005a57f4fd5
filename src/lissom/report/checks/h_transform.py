"""The check of the weighted h-transform: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import h_transform as study
from lissom.evals.stats import paired_bootstrap, verdict
from lissom.report.checks import grid, pipeline_or_none, study_check
from lissom.report.rows import Claim, Result, Row

SOURCE = "arXiv 2603.12057"


def result(run: study.Run) -> Result:
    """Fidelity and quality of every arm, and the methods' frontiers against SDEdit's."""
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
        for method in _methods(run, kind, sampler):
            if method != study.SDEDIT:
                gap = run.ahead(kind, sampler, method, study.SDEDIT)
                rows.append(
                    Row(f"{kind}/{sampler}/{method}/frontier against SDEdit's", gap.estimate, "share", 0.0, None,
                        gap.low, gap.high, len(next(iter(arms.values())).psnr))
                )  # fmt: skip
    return Result("h-transform", rows, claims(run), facts)


def claims(run: study.Run) -> list[Claim]:
    """Where the h-transform is ahead of each other method, and where it is not."""
    found = []
    for kind, sampler in run.arms:
        others = [method for method in _methods(run, kind, sampler) if method not in (study.H_VP, study.H_FLOW)]
        for ours, other in product((study.H_VP, study.H_FLOW), others):
            gap = run.ahead(kind, sampler, ours, other)
            words = (
                f"{kind}, {sampler}: {ours} has a larger frontier than {other}: {gap.estimate:+.0%} "
                f"[{gap.low:+.0%}, {gap.high:+.0%}]"
            )
            found.append(Claim(words, SOURCE, verdict([-gap], 0.0, strict=True)))
    return found


def tables(run: study.Run) -> Iterator[Table]:
    """For every kind of guide and sampler each arm's fidelity and quality."""
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


def _methods(run: study.Run, kind: str, sampler: str) -> list[str]:
    return list(dict.fromkeys(method for method, _ in run.arms[kind, sampler] if method in study.STRENGTHS))


CHECK = study_check(study, result, tables, model=None, load=pipeline_or_none)
