"""The outcome of a search as rows, and as a table in the terminal."""

from __future__ import annotations

import statistics

from rich.box import SIMPLE
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evolve.measure import Measured
from lissom.evolve.optimize import Outcome, answer_seconds
from lissom.report import peers
from lissom.report.rows import Result, Row


def result(outcome: Outcome) -> Result:
    """Every figure of every recipe in the one shape of everything measured."""
    rows = []
    base, profile = outcome.base, outcome.profile
    for m in outcome.measured:
        n = sum(len(record["scores"]) for record in m.quality)
        speed = {"n": len(m.timings)}
        rows += [
            Row(f"{m.label}/quality loss", m.loss.estimate, "share", 0.0, None, m.loss.low, m.loss.high, n),
            Row(f"{m.label}/KL", m.over_questions("kl"), "nats", 0.0, n=n),
            Row(f"{m.label}/top-1 agreement", m.over_questions("top1"), "share", 1.0, n=n),
            Row(f"{m.label}/facts recalled", m.recall, "share", base.recall, n=n),
            _row(m, "whole answer", answer_seconds(m, profile), "s", answer_seconds(base, profile), **speed),
            _timed(m, "first token", [profile.first_token(t) for t in m.timings], "s", profile.first_token(base)),
            _timed(m, "decode", [profile.decode(t) for t in m.timings], "s/token", profile.decode(base)),
            _row(m, "weights", m.weight_bytes, "bytes", base.weight_bytes, n=1),
            _row(m, "KV cache", m.cache_bytes, "bytes", base.cache_bytes, n=len(m.quality)),
            _row(m, "weights and cache", m.memory, "bytes", base.memory, n=len(m.quality)),
        ]
        if m.peak_bytes is not None and base.peak_bytes is not None:
            rows.append(_row(m, "peak memory", m.peak_bytes, "bytes", base.peak_bytes, n=1))
        if m.energy is not None and base.energy is not None:
            rows.append(_row(m, "energy", m.energy, "J", base.energy, **speed))
    facts = {
        "model": base.recipe.model,
        "best": outcome.best.label,
        "front": [m.label for m in outcome.front],
        "max_quality_loss": outcome.max_loss,
        "prefer": outcome.prefer,
        "finished": outcome.finished,
        "failed": outcome.failed,
        "untried": outcome.untried,
    }
    if outcome.peers is not None:
        rows += peers.rows(outcome.peers, "peers/")
        facts["peers"] = peers.facts(outcome.peers)
    return Result("optimize", rows, facts=describe() | facts | profile.facts())


def _row(m: Measured, name: str, value: float, unit: str, baseline: float, n: int) -> Row:
    return Row(f"{m.label}/{name}", value, unit, baseline, baseline / value if value else None, n=n)


def _timed(m: Measured, name: str, seconds: list[float], unit: str, baseline: float) -> Row:
    """Median of the timed runs, with the least and the greatest."""
    value = statistics.median(seconds)
    return Row(f"{m.label}/{name}", value, unit, baseline, baseline / value, min(seconds), max(seconds), len(seconds))


def cells(m: Measured, outcome: Outcome) -> dict[str, str]:
    """One line of the Pareto table, heading by heading."""
    base, profile = outcome.base, outcome.profile
    first, decode = profile.first_token(m), profile.decode(m)
    interval = "" if m is base else f" [{m.loss.low:+.1%}, {m.loss.high:+.1%}]"
    return {
        "recipe": m.label,
        "quality loss [95 %]": f"{m.loss.estimate:.1%}{interval}",
        "facts": f"{m.recall:.0%}",
        "first token": f"{first:.2f} s ({profile.first_token(base) / first:.2f}x)",
        "decode": f"{1 / decode:.1f} tok/s ({profile.decode(base) / decode:.2f}x)",
        "runs": str(len(m.timings)),
        "weights": f"{m.weight_bytes / 1e6:.0f} MB ({m.weight_bytes / base.weight_bytes:.0%})",
        "KV cache": f"{m.cache_bytes / 1e6:.1f} MB ({m.cache_bytes / base.cache_bytes:.0%})",
        "peak memory": "" if m.peak_bytes is None else f"{m.peak_bytes / 1e6:.0f} MB",
        "energy": "n/a" if m.energy is None else f"{m.energy:.1f} J",
    }


def table(outcome: Outcome, everything: bool = False) -> Table:
    """The Pareto front within the accepted loss (or `everything`), best quality first; the chosen recipe is marked."""
    acceptable = [m for m in outcome.front if m.loss.estimate <= outcome.max_loss]
    wanted = outcome.measured if everything else (outcome.base, *acceptable)
    shown = sorted({id(m): m for m in wanted}.values(), key=lambda m: m.loss.estimate)
    heading = f"Pareto front within a loss of {outcome.max_loss:.1%}"
    more = f", {len(outcome.front) - len(acceptable)} more beyond it" if len(acceptable) < len(outcome.front) else ""
    title = f"{'Recipes' if everything else heading} ({len(outcome.measured)} measured{more})"
    view = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))  # narrow: eighty columns show everything
    view.add_column("recipe", min_width=18)
    for name in ("loss", "facts", "first", "decode", "weights", "cache"):
        view.add_column(name, justify="right", no_wrap=True)
    device = outcome.profile
    for m in shown:
        view.add_row(
            ("[bold]→ " if m is outcome.best else "") + m.label,
            f"{m.loss.estimate:.1%}",
            f"{m.recall:.0%}",
            f"{device.first_token(m):.2f} s",
            f"{1 / device.decode(m):.1f}/s",
            f"{m.weight_bytes / 1e6:.0f} MB",
            f"{m.cache_bytes / 1e6:.1f} MB",
        )
    return view
