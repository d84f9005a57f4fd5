"""The check of NOBLE: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import noble as study
from lissom.evals.stats import Interval, signed
from lissom.report.checks import grid, study_check
from lissom.report.rows import Claim, Result, Row

SOURCE = "arXiv 2603.06492"


def result(run: study.Run) -> Result:
    """Every arm: what it ends at and how far that is from CosNet, steps and time to the baseline's loss, what a step
    costs; and the learning rates that were tried."""
    facts = describe(gpu=True) | {
        "steps": run.size.config.steps,
        "tokens": run.size.config.steps * run.size.config.batch_size * run.size.config.context,
        "rank": run.size.rank,
        "rates": {arm: run.rates[arm] for arm in (study.PLAIN, study.COSNET)},
    }
    rows = [row for arm in run.trained for row in _rows(run, arm)]
    for arm, losses in run.rates["tuning"].items():
        rows += [Row(f"tuning/{arm}/{rate:g}", loss, "nats") for rate, loss in losses.items()]
    rows += [row for arm in run.seconds for row in _costs(run, arm)]
    claims = [Claim(words, SOURCE, verdict) for words, verdict in study.verdicts(run)]
    return Result("noble", rows, claims, facts)


def _rows(run: study.Run, arm: str) -> Iterator[Row]:
    final = run.final(arm)
    seeds = len(final)
    yield Row(f"training/{arm}/NLL", float(final.mean()), "nats", n=seeds)
    if arm != study.COSNET and study.COSNET in run.trained:
        gap = run.above(study.COSNET, arm)
        yield Row(f"training/{arm}/NLL of CosNet above it", gap.estimate, "nats", 0.0, None, gap.low, gap.high, seeds)
    if arm != study.PLAIN:
        for what, found in (("steps", run.speedup(arm)), ("time", run.net(arm))):
            yield Row(
                f"training/{arm}/{what} to the baseline's loss", found.estimate, "x", 1.0, found.estimate, found.low,
                found.high, seeds,
            )  # fmt: skip


def _costs(run: study.Run, arm: str) -> Iterator[Row]:
    """Of a step; ratios are better above 1, as everywhere."""
    time = run.step_time(arm)
    base = float(np.median(run.seconds[study.PLAIN]))
    yield Row(
        f"step/{arm}/time", float(np.median(run.seconds[arm])) * 1e3, "ms", base * 1e3, 1 / time.estimate,
        1 / time.high, 1 / time.low, len(run.seconds[arm]),
    )  # fmt: skip
    counts = (("parameters", run.parameters, ""), ("operations", run.operations, "FLOP"), ("kept", run.kept, "B"))
    for what, values, unit in counts:
        yield Row(f"step/{arm}/{what}", values[arm], unit, values[study.PLAIN], values[study.PLAIN] / values[arm])


def tables(run: study.Run) -> Iterator[Table]:
    """What each arm comes to, what it costs, and the rates that were tried."""
    title = f"From scratch: {run.size.config.steps} steps, {len(run.size.seeds)} seeds, rank {run.size.rank}"
    headings = ("arm", "NLL", "CosNet above it [95 %]", "fewer steps [95 %]", "less time [95 %]")
    table = grid(title, *headings, numbers=True)
    for arm in run.trained:
        others = ["", ""] if arm == study.PLAIN else [_times(run.speedup(arm)), _times(run.net(arm))]
        gap = signed(run.above(study.COSNET, arm)) if study.COSNET in run.trained and arm != study.COSNET else ""
        table.add_row(arm, f"{run.final(arm).mean():.4f}", gap, *others)
    yield table
    table = grid(
        "A step, against the baseline's", "arm", "parameters", "operations", "time [95 %]", "kept", numbers=True
    )
    for arm in run.seconds:
        shares = [values[arm] / values[study.PLAIN] - 1 for values in (run.parameters, run.operations)]
        table.add_row(
            arm, *(f"{share:+.1%}" for share in shares), _times(run.step_time(arm)),
            f"{run.kept[arm] / run.kept[study.PLAIN] - 1:+.1%}",
        )  # fmt: skip
    yield table
    table = grid("Learning rates, short runs", "", *(f"{rate:g}" for rate in run.size.rates), numbers=True)
    for arm, losses in run.rates["tuning"].items():
        table.add_row(arm, *(f"{loss:.4f}" for loss in losses.values()))
    yield table


def _times(found: Interval) -> str:
    return f"{found.estimate:.2f}x [{found.low:.2f}, {found.high:.2f}]"


CHECK = study_check(study, result, tables)
