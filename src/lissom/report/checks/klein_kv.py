"""The check of Klein KV: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import klein_kv as study
from lissom.evals.editing import KINDS, METRICS
from lissom.evals.reference_speed import ARMS, CACHED, FULL, THEIRS, WARM, bounds
from lissom.evals.stats import Interval, ratio_interval, signed, verdict
from lissom.report.checks import grid, model_or_none, study_check
from lissom.report.rows import Claim, Result, Row

SOURCE = "FLUX.2 klein KV"
OURS = "lissom"
BY_WORD = next(iter(KINDS))
_EXACT = 1e-4  # of entries of about 1
_BOUND = 0.85
_AS_FAST = 1.02
_UNITS = {"psnr": "dB", "recognised": "share", "style": "share"}


def result(run: study.Run) -> Result:
    """Losses, scores of edits, differences, times, bytes."""
    size = run.size
    facts = describe() | {
        "steps": size.form.config.steps, "short": size.short.steps, "concepts": size.concepts, "rank": size.rank,
        "sampler": size.steps,
    }  # fmt: skip
    rows = [
        Row(f"loss/{arm}/{name.removeprefix('held_out_')} references", value, "", run.losses[study.PLAIN][name],
            run.losses[study.PLAIN][name] / value)
        for arm, losses in run.losses.items() for name, value in losses.items()
    ]  # fmt: skip
    for kind, arm in run.edits:
        for name in METRICS:
            found, gap, n = run.score(kind, arm, name), run.gained(kind, arm, name), len(run.edits[kind, arm][name])
            title, unit = f"edit {kind}/{arm}/{name}", _UNITS.get(name, "")
            rows.append(Row(title, found.estimate, unit, None, None, found.low, found.high, n))
            rows.append(Row(f"{title} gained", gap.estimate, unit, 0.0, None, gap.low, gap.high, n))
    rows += [Row(f"difference/{count} references", value, "") for count, value in run.differences.items()]
    rows += [Row(f"bytes/{arm}", value, "B") for arm, value in run.held.items() if value]
    rows += list(speed_rows(run.seconds))
    return Result("klein-kv", rows, claims(run), facts)


def speed_rows(seconds: dict[study.Setting, dict[str, list[float]]]) -> Iterator[Row]:
    """Times of each way to draw, and how many times less there is to compute."""
    for setting, arms in seconds.items():
        base = float(np.median(arms[FULL])) * 1e3
        for arm in ARMS:
            ratio = ratio_interval(arms[FULL], arms[arm])
            yield Row(f"time/{setting}/{arm}", float(np.median(arms[arm])) * 1e3, "ms", base, ratio.estimate, ratio.low,
                      ratio.high, len(arms[arm]))  # fmt: skip
        for arm, bound in bounds(setting).items():
            yield Row(f"bound/{setting}/{arm}", bound, "x")


def speed_claims(seconds: dict[study.Setting, dict[str, list[float]]]) -> Iterator[Claim]:
    """What the times come to."""
    for arm in (CACHED, WARM):
        shares = [
            _scaled(ratio_interval(arms[FULL], arms[arm]), 1 / bounds(setting)[arm])
            for setting, arms in seconds.items()
        ]
        least = min(share.estimate for share in shares)
        words = f"{arm}: at least {_BOUND:.0%} of what the operations allow; the least is {least:.0%}"
        yield Claim(words, OURS, verdict([-share for share in shares], -_BOUND))
    slower = [ratio_interval(arms[CACHED], arms[THEIRS]) for arms in seconds.values()]
    most = max(found.estimate for found in slower)
    words = f"as fast as diffusers' own cache, within {_AS_FAST - 1:.0%}: at most {most:.2f} of its time"
    yield Claim(words, OURS, verdict(slower, _AS_FAST))
    few = min(setting.steps for setting in seconds)
    best: dict[int, float] = {}
    for setting, arms in seconds.items():
        if setting.steps == few:
            faster = ratio_interval(arms[FULL], arms[CACHED]).estimate
            best[setting.pictures] = max(faster, best.get(setting.pictures, 0.0))
    words = f"one picture in 4 steps up to 2.5 times faster; in {few} steps here up to {best[1]:.2f} times"
    yield Claim(words, SOURCE, "holds" if best[1] >= 2.5 else "weaker")
    for count in sorted(best.keys() - {1}):
        words = (
            f"{count} pictures at once gain more, as references are read once for all: up to {best[count]:.2f} times"
        )
        yield Claim(words, OURS, "holds" if best[count] > best[1] else "does not hold")


def claims(run: study.Run) -> list[Claim]:
    """All that is claimed."""
    worst = max(run.differences.values())
    found = [
        Claim(
            f"with a cache every step is what it is without one: entries differ by up to {worst:.1e}", SOURCE,
            "holds" if worst <= _EXACT else "does not hold",
        )
    ]  # fmt: skip
    forced = run.gained(BY_WORD, study.FORCED, "psnr")
    found.append(
        Claim(
            f"forced on a model that was not trained for it a cache spoils edits: {signed(forced)} dB", OURS,
            verdict([forced], 0.0, strict=True),
        )
    )  # fmt: skip
    for arm in (study.MADE, study.LORA):
        gap = run.gained(BY_WORD, arm, "psnr")
        ratios = [run.losses[arm][name] / value for name, value in run.losses[study.PLAIN].items()]
        words = f"{arm}: the loss is within 1 % of the ordinary model's ({max(ratios) - 1:+.1%}); {signed(gap)} dB"
        found.append(Claim(words, OURS, "holds" if max(ratios) <= 1.01 else "does not hold"))
    return [*found, *speed_claims(run.seconds)]


def tables(run: study.Run) -> Iterator[Table]:
    """Losses, edits, and times beside their bounds."""
    names = list(run.losses[study.PLAIN])
    counts = [name.removeprefix("held_out_") for name in names]
    table = grid("Loss on held-out concepts, by references", "", *counts, numbers=True)
    for arm, losses in run.losses.items():
        table.add_row(arm, *(f"{losses[name]:.4f}" for name in names))
    yield table
    for kind in run.size.kinds:
        title = f"Edits {kind} of {run.size.concepts} held-out concepts, {run.size.steps} steps"
        table = grid(title, "", *METRICS, "psnr gained [95 %]", numbers=True)
        for arm in study.EDITING:
            gap = "" if arm == study.PLAIN else signed(run.gained(kind, arm, "psnr"))
            table.add_row(arm, *(f"{run.score(kind, arm, name).estimate:.3f}" for name in METRICS), gap)
        table.caption = f"Some of the pictures: {run.pictures}"
        yield table
    yield speed_table(run.seconds)


def speed_table(seconds: dict[study.Setting, dict[str, list[float]]]) -> Table:
    """Times faster than with references in every step, with the bound in brackets."""
    table = grid("Times faster than with references in every step (bound)", "", "ms", *ARMS[1:], numbers=True)
    for setting, arms in seconds.items():
        limits = bounds(setting)
        cells = [
            f"{ratio_interval(arms[FULL], arms[arm]).estimate:.2f}" + (f" ({limits[arm]:.2f})" if arm in limits else "")
            for arm in ARMS[1:]
        ]
        table.add_row(str(setting), f"{float(np.median(arms[FULL])) * 1e3:.0f}", *cells)
    return table


def _scaled(found: Interval, by: float) -> Interval:
    return Interval(found.estimate * by, found.low * by, found.high * by)


CHECK = study_check(study, result, tables, model=None, load=model_or_none)
