"""A comparison of runtimes as rows, and as tables in the terminal."""

from __future__ import annotations

from typing import Any

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
            if _is_ours(ours.label) and not _is_ours(theirs.label) and _same_job(ours, theirs):
                ratio = ours.against(theirs)
                name = f"{_where(ours, prefix)}/{ours.label} against {theirs.label}/{ours.metric.name}"
                medians = ours.interval.estimate, ours.metric.unit, theirs.interval.estimate
                n = min(len(ours.rounds), len(theirs.rounds))
                found.append(Row(name, *medians, ratio.estimate, ratio.low, ratio.high, n))
    return found


def _where(value: Value, prefix: str) -> str:
    return f"{prefix}threads {value.threads}/context {value.context}"


def _is_ours(label: str) -> bool:
    return label.split()[0] == OURS


def _same_job(one: Value, other: Value) -> bool:
    return (one.threads, one.context, one.metric) == (other.threads, other.context, other.metric)


def facts(comparison: Comparison) -> dict[str, Any]:
    """What is needed to judge the rows: runtimes and their settings, and what could not run."""
    best = {f"{_where(v, '')}/{v.label}/{v.metric.name}": v.arm for v in summarise(comparison) if v.arm != v.label}
    return {
        "runtimes": {figure.arm: figure.facts for figure in comparison.figures}, "settings": best,
        "failed": comparison.failed, "notes": comparison.notes,
    }  # fmt: skip


def result(comparison: Comparison, name: str = "bench") -> Result:
    """The rows, with the machine and `facts`."""
    return Result(name, rows(comparison), facts=describe() | {"model": comparison.model} | facts(comparison))


def cells(comparison: Comparison) -> dict[tuple[int, int], list[dict[str, str]]]:
    """Lines of a table for each number of threads and context, heading by heading. The ratios say how much better the
    first of lissom's is."""
    values, found = summarise(comparison), dict[tuple[int, int], list[dict[str, str]]]()
    for place in dict.fromkeys((value.threads, value.context) for value in values):
        here = {(v.label, v.metric.name): v for v in values if (v.threads, v.context) == place}
        labels = list(dict.fromkeys(label for label, _ in here))
        ours = next((v.label for v in here.values() if _is_ours(v.label)), "")
        found[place] = [_line(here, label, ours) for label in labels]
    return found


def _line(here: dict[tuple[str, str], Value], label: str, ours: str) -> dict[str, str]:
    decode, first, peak = (here.get((label, metric)) for metric in ("decode", "first token", "peak memory"))
    return {
        "runtime": label,
        "tokens/s": "" if decode is None else f"{decode.interval.estimate:.1f}",
        "[95 %]": "" if decode is None else f"{decode.interval.low:.1f}–{decode.interval.high:.1f}",
        "decode ratio": _factor(here, "decode", label, ours),
        "first": "" if first is None else f"{first.interval.estimate:.3f} s",
        "first ratio": _factor(here, "first token", label, ours),
        "memory": "" if peak is None else f"{peak.rounds[0] / 1e6:.0f} MB",
    }


def _factor(here: dict[tuple[str, str], Value], metric: str, label: str, ours: str) -> str:
    mine, theirs = here.get((ours, metric)), here.get((label, metric))
    return "" if mine is None or theirs is None or label == ours else f"{mine.against(theirs).estimate:.2f}"


def title(comparison: Comparison, threads: int, context: int) -> str:
    """What a table shows."""
    return f"{comparison.model}, {threads} thread{'s' * (threads > 1)}, context {context}"


def tables(comparison: Comparison) -> list[Table]:
    """One table for each number of threads and context; see `cells`."""
    found = []
    for place, lines in cells(comparison).items():
        table = Table(title=title(comparison, *place), box=SIMPLE, padding=(0, 1, 0, 0))  # eighty columns show it all
        for heading in lines[0]:
            left = heading == "runtime"
            table.add_column(
                f"{OURS} x" if "ratio" in heading else heading,
                min_width=18 if left else None,
                justify="left" if left else "right",
                no_wrap=not left,
            )
        for line in lines:
            label, *others = line.values()
            table.add_row(f"[bold]{label}" if _is_ours(label) else label, *others)
        found.append(table)
    return found


def unmeasured(comparison: Comparison) -> list[str]:
    """Why some runtimes have no figures, one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in comparison.failed.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
