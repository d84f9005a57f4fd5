"""A comparison of runtimes as rows, and as tables in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.peers import OURS, Comparison, Value, summarise
from lissom.report.rows import Result, Row


def rows(comparison: Comparison, prefix: str = "") -> list[Row]:
    """Every runtime's own figures, and lissom's against each of the others'.

    Names are `threads N/context N/RUNTIME/METRIC`; in a row `.../OURS against RUNTIME/METRIC` the interval is that of
    the ratio.
    """
    values, found = summarise(comparison), list[Row]()
    for value in values:
        own = value.interval
        name = f"{_where(value, prefix)}/{value.label}/{value.metric.name}"
        found.append(Row(name, own.estimate, value.metric.unit, low=own.low, high=own.high, n=len(value.rounds)))
    for ours in values:
        for theirs in values:
            if _is_ours(ours) and not _is_ours(theirs) and _same_job(ours, theirs):
                ratio = ours.against(theirs)
                name = f"{_where(ours, prefix)}/{ours.label} against {theirs.label}/{ours.metric.name}"
                medians = ours.interval.estimate, ours.metric.unit, theirs.interval.estimate
                n = min(len(ours.rounds), len(theirs.rounds))
                found.append(Row(name, *medians, ratio.estimate, ratio.low, ratio.high, n))
    return found


def _where(value: Value, prefix: str) -> str:
    return f"{prefix}threads {value.threads}/context {value.context}"


def _is_ours(value: Value) -> bool:
    return value.label.split()[0] == OURS


def _same_job(one: Value, other: Value) -> bool:
    return (one.threads, one.context, one.metric) == (other.threads, other.context, other.metric)


def result(comparison: Comparison, name: str = "bench") -> Result:
    """The rows with what is needed to judge them: machine, runtimes and their settings, and what could not run."""
    runtimes = {figure.arm: figure.facts for figure in comparison.figures}
    best = {f"{_where(v, '')}/{v.label}/{v.metric.name}": v.arm for v in summarise(comparison) if v.arm != v.label}
    facts = {
        "model": comparison.model, "runtimes": runtimes, "settings": best, "failed": comparison.failed,
        "notes": comparison.notes,
    }  # fmt: skip
    return Result(name, rows(comparison), facts=describe() | facts)


def tables(comparison: Comparison) -> list[Table]:
    """One table for each number of threads and context. The factors say how much better lissom is."""
    values = summarise(comparison)
    found = []
    for threads, context in dict.fromkeys((value.threads, value.context) for value in values):
        here = {(v.label, v.metric.name): v for v in values if (v.threads, v.context) == (threads, context)}
        title = f"{comparison.model}, {threads} thread{'s' * (threads > 1)}, context {context}"
        table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))  # narrow: eighty columns show everything
        table.add_column("runtime", min_width=20)
        for heading in ("tokens/s", "[95 %]", f"{OURS} x", "first token", f"{OURS} x", "memory"):
            table.add_column(heading, justify="right", no_wrap=True)
        for label in dict.fromkeys(label for label, _ in here):
            decode, first, peak = (here.get((label, metric)) for metric in ("decode", "first token", "peak memory"))
            span = "" if decode is None else f"{decode.interval.low:.1f}–{decode.interval.high:.1f}"
            table.add_row(
                f"[bold]{label}" if label == OURS else label,
                "" if decode is None else f"{decode.interval.estimate:.1f}",
                span,
                _factor(here, "decode", label),
                "" if first is None else f"{first.interval.estimate:.3f} s",
                _factor(here, "first token", label),
                "" if peak is None else f"{peak.rounds[0] / 1e6:.0f} MB",
            )
        found.append(table)
    return found


def _factor(here: dict[tuple[str, str], Value], metric: str, label: str) -> str:
    ours, theirs = here.get((OURS, metric)), here.get((label, metric))
    return "" if ours is None or theirs is None or label == OURS else f"{ours.against(theirs).estimate:.2f}"
