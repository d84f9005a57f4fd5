"""The check of BandPO: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import bandpo as study
from lissom.evals.stats import mean_interval, signed
from lissom.report.checks import grid, model_or_none, study_check
from lissom.report.rows import Claim, Result, Row
from lissom.rl.band.diagnostics import BUCKETS, SIGNS

_BANDIT = (("returns", "return"), ("best", "P(best)"), ("entropy", "entropy"), ("clipped", "clipped"))
_LEARNED = (("mean", "mean@K"), ("best", "pass@K"), ("entropy", "late entropy"), ("rare", "rare clipped up"))


def result(run: study.Run) -> Result:
    """Errors of solver and table, times, the bandit's arms, and what each policy came to."""
    facts = describe() | {
        "rates": {arm: run.rates[arm] for arm in (study.HIGHER, study.KL)},
        "policy": dict(run.policy),
        "tokens": run.size.config.token_budget,
        "held out": run.size.held_out,
    }
    rows = [
        Row(f"bounds/{name}/{what}", value, "")
        for name, errors in run.errors.items()
        for what, value in errors.items()
    ]  # fmt: skip
    for what in run.seconds:
        base = study.LOSS if what in (study.LOSS, study.LOSS_LOOKED_UP) else study.CLAMP
        cost, milliseconds = run.cost(what, base), [1e3 * float(np.median(run.seconds[name])) for name in (what, base)]
        rows.append(
            Row(
                f"time/{what}", milliseconds[0], "ms", milliseconds[1], 1 / cost.estimate, 1 / cost.high, 1 / cost.low,
                run.size.rounds,
            )
        )  # fmt: skip
    for arm, inner in run.played:
        for name, words in _BANDIT:
            rows.append(_row(f"bandit/{inner} inner steps/{arm}/{words}", run.bandit(arm, name, inner)))
    for arm, rates in run.rates["tuning"].items():
        rows += [Row(f"tuning/{arm}/{rate:g}", reached, "mean@K") for rate, reached in rates.items()]
    rows += [Row(f"learning/before/{words}", _begin(run, n), "") for n, words in ((1, "mean@K"), (2, "pass@K"))]
    for arm in run.trained:
        rows += [_row(f"learning/{arm}/{words}", run.final(arm, name)) for name, words in _LEARNED]
        if arm != study.HIGHER and study.HIGHER in run.trained:
            gap = run.gap(arm, study.HIGHER, "mean")
            rows.append(
                Row(f"learning/{arm}/mean@K above Clip-Higher", gap.estimate, "", 0.0, None, gap.low, gap.high,
                    len(run.size.seeds))
            )  # fmt: skip
        rows += [
            Row(f"learning/{arm}/clipped/{sign}/{bucket}", share, "")
            for sign in SIGNS for bucket in BUCKETS if (share := _clipped(run, arm, sign, bucket)) is not None
        ]  # fmt: skip
        rows += [Row(f"learning/{arm}/curve/{number}", y, "mean@K") for number, y in enumerate(_curve(run, arm))]
    claims = [Claim(words, source, verdict) for words, source, verdict in study.verdicts(run)]
    return Result("bandpo", rows, claims, facts)


def _row(name: str, values: np.ndarray) -> Row:
    found = mean_interval(values)
    return Row(name, found.estimate, "", None, None, found.low, found.high, len(values))


def _clipped(run: study.Run, arm: str, sign: str, bucket: str) -> float | None:
    shares = [record["clipped"][f"{sign}/{bucket}"] for record in run.trained[arm]]
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None


def _curve(run: study.Run, arm: str) -> list[float]:
    """mean@K at each measurement, mean over seeds; as many as all have."""
    curves: list[list[Any]] = [record["curve"] for record in run.trained[arm]]
    return [float(np.mean([curve[n][1] for curve in curves])) for n in range(min(map(len, curves)))]


def tables(run: study.Run) -> Iterator[Table]:
    """Times, the bandit, what was learned, and what was clipped."""
    table = grid(f"Bounds of {run.size.tokens:,} tokens", "", "ms", "times [95 %]", numbers=True)
    for what, seconds in run.seconds.items():
        base = study.LOSS if what in (study.LOSS, study.LOSS_LOOKED_UP) else study.CLAMP
        cost = run.cost(what, base)
        table.add_row(what, f"{np.median(seconds) * 1e3:.2f}", f"{cost.estimate:.2f} [{cost.low:.2f}, {cost.high:.2f}]")
    yield table
    inner = run.size.bandit.inner_steps
    title = f"Bandit: {inner} inner steps, {run.size.bandit_seeds} seeds; with one, the return of every arm"
    table = grid(title, "arm", *(words for _, words in _BANDIT), "return, 1 inner step", numbers=True)
    for arm in study.BOUNDS:
        cells = [f"{run.bandit(arm, name).mean():.3f}" for name, _ in _BANDIT]
        table.add_row(arm, *cells, f"{run.bandit(arm, 'returns', 1).mean():.3f}")
    yield table
    title = f"Countdown: {run.size.config.token_budget:,} generated tokens, {len(run.size.seeds)} seeds"
    table = grid(title, "arm", *(words for _, words in _LEARNED), "mean@K above Clip-Higher [95 %]", numbers=True)
    table.add_row("before", f"{_begin(run, 1):.3f}", f"{_begin(run, 2):.3f}", "", "", "")
    for arm in run.trained:
        gap = (
            "" if arm == study.HIGHER or study.HIGHER not in run.trained else signed(run.gap(arm, study.HIGHER, "mean"))
        )
        table.add_row(arm, *(f"{run.final(arm, name).mean():.3f}" for name, _ in _LEARNED), gap)
    yield table
    for sign, words in zip(SIGNS, ("upwards", "downwards"), strict=True):
        table = grid(f"Share of tokens that are clipped {words}, by old probability", "arm", *BUCKETS, numbers=True)
        for arm in run.trained:
            shares = [_clipped(run, arm, sign, bucket) for bucket in BUCKETS]
            table.add_row(arm, *("" if share is None else f"{share:.1%}" for share in shares))
        yield table


def _begin(run: study.Run, column: int) -> float:
    return float(np.mean([record["curve"][0][column] for records in run.trained.values() for record in records]))


CHECK = study_check(study, result, tables, model=None, load=model_or_none)
