"""The check of FlashPrefill: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from lissom.evals.checks import flash_prefill as study
from lissom.evals.checks.flash_prefill import DENSE, FLASH, NATIVE, OWN, ROWS, SDPA, STRICT, Run
from lissom.evals.stats import Interval, median_interval, paired_bootstrap, ratio_interval, signed
from lissom.report.checks import grid, study_check
from lissom.report.rows import Claim, Result, Row

SOURCE = "lissom"
LENGTH = 8192  # tokens for which most is claimed
NLL = 0.03  # nats per token above dense attention
CHOOSING = 0.05  # of the time of sparse attention
LEAST = 50  # items of a task below which nothing is said of it
ITEMS = 1 / LEAST  # that may be missed


def result(run: Run) -> Result:
    """Every figure against its baselines, and the verdicts."""
    layers = Row("layers", run.layers, "")
    rows = [layers, *_text_rows(run), *_task_rows(run), *_time_rows(run), *_synthetic_rows(run)]
    return Result("flash-prefill", rows, list(_claims(run)))


def above_dense(run: Run, source: str, tokens: int, arm: str) -> Interval:
    """NLL of an arm above dense attention's; bootstrap over stretches of text."""
    ours, dense = (np.array(run.texts[source, tokens, name]["nll"]) for name in (arm, DENSE))
    return paired_bootstrap(ours, dense)


def _text_rows(run: Run) -> Iterator[Row]:
    for (source, tokens, arm), found in run.texts.items():
        gap, mean = above_dense(run, source, tokens, arm), float(np.mean(found["nll"]))
        base, where = float(np.mean(run.texts[source, tokens, DENSE]["nll"])), f"text/{source}/{tokens}/{arm}"
        yield Row(f"{where}/NLL", mean, "nats", base, n=len(found["nll"]))
        yield Row(f"{where}/NLL above dense", gap.estimate, "nats", 0.0, None, gap.low, gap.high)
        yield Row(f"{where}/density", found["density"], "share", 1.0)


def task_of(run: Run, task: str, arm: str, what: str = "right") -> np.ndarray:
    """Right items of all lengths, as 0 and 1, or the `nll` of all trials."""
    parts = [found[what] for (name, _, other), found in run.tasks.items() if (name, other) == (task, arm)]
    return np.array([value for part in parts for value in part], float)


def task_nll(run: Run, task: str, arm: str) -> float:
    """Mean over trials of all lengths."""
    return float(task_of(run, task, arm, "nll").mean())


def task_arms(run: Run) -> list[str]:
    return list(dict.fromkeys(arm for _, _, arm in run.tasks))


def _task_rows(run: Run) -> Iterator[Row]:
    for task in dict.fromkeys(task for task, _, _ in run.tasks):
        dense = task_of(run, task, DENSE)
        for arm in task_arms(run):
            right = task_of(run, task, arm)
            gap = paired_bootstrap(right, dense)
            yield Row(f"task/{task}/{arm}/right", float(np.mean(right)), "share", float(np.mean(dense)), n=len(right))
            yield Row(f"task/{task}/{arm}/right above dense", gap.estimate, "share", 0.0, None, gap.low, gap.high)
            yield Row(f"task/{task}/{arm}/NLL", task_nll(run, task, arm), "nats", task_nll(run, task, DENSE))
    for (task, tokens, arm), found in run.tasks.items():
        yield Row(f"task/{task}/{arm}/density at {tokens}", found["density"], "share", 1.0)


def _time_rows(run: Run) -> Iterator[Row]:
    for (dtype, tokens, arm), found in run.times.items():
        where = f"time/{dtype}/{tokens}/{arm}"
        for what in ("whole", "attention"):
            own, base = median_interval(found[what]), run.times[dtype, tokens, SDPA][what]
            ratio = ratio_interval(base, found[what]).estimate
            yield Row(
                f"{where}/{what}", own.estimate, "s", float(np.median(base)), ratio, own.low, own.high, len(found[what])
            )
        if arm != SDPA:
            yield Row(f"{where}/choosing", choosing(found), "share of attention")
            yield Row(f"{where}/density", float(np.median(found["density"])), "share", 1.0)


def choosing(found: dict) -> float:
    """Share of the attention's time."""
    return float(np.median(np.array(found["choosing"]) / np.array(found["attention"])))


def _synthetic_rows(run: Run) -> Iterator[Row]:
    for (entries, arm), found in run.synthetic.items():
        own, base = median_interval(found["seconds"]), run.synthetic[entries, SDPA]["seconds"]
        values = own.estimate, "s", float(np.median(base)), ratio_interval(base, found["seconds"]).estimate
        yield Row(f"synthetic/{entries}/{arm}/attention of a layer", *values, own.low, own.high, len(found["seconds"]))
        yield Row(f"synthetic/{entries}/{arm}/density", found["density"], "share", 1.0)


def _claims(run: Run) -> Iterator[Claim]:
    def claim(words: str, holds: bool, almost: bool) -> Claim:
        return Claim(words, SOURCE, "holds" if holds else "weaker" if almost else "does not hold")

    def faster(words: str, above: list[float], below: list[float], factor: float) -> Claim:
        found = ratio_interval(above, below)
        reached = f"{words} is at least {factor}x as fast: {found.estimate:.2f}x [{found.low:.2f}, {found.high:.2f}]"
        return claim(reached, found.low >= factor, found.estimate >= factor)

    for dtype, whole in (("float32", 1.7), ("bfloat16", 2.5)):
        if (dtype, LENGTH, FLASH) in run.times:
            ours, own, sdpa = (run.times[dtype, LENGTH, arm] for arm in (FLASH, OWN, SDPA))
            where = f"{LENGTH} tokens, {dtype}"
            yield faster(f"{where}: the whole prompt, beside SDPA,", sdpa["whole"], ours["whole"], whole)
            if dtype == "float32":
                yield faster(f"{where}: attention, beside SDPA,", sdpa["attention"], ours["attention"], 6.0)
                yield faster(f"{where}: attention, beside all blocks,", own["attention"], ours["attention"], 2.2)
            for arm in (FLASH, ROWS, f"{NATIVE}, {FLASH}"):
                if (dtype, LENGTH, arm) not in run.times:
                    continue
                share = choosing(run.times[dtype, LENGTH, arm])
                words = f"{where}, {arm}: choosing takes at most {CHOOSING:.0%} of the attention: {share:.1%}"
                yield claim(words, share <= CHOOSING, False)
    if (LENGTH, OWN) in run.synthetic:
        parts = {arm: run.synthetic[LENGTH, arm] for arm in study.SYNTHETIC}
        seconds = {arm: part["seconds"] for arm, part in parts.items()}
        yield faster(f"{LENGTH} entries: our kernel with all blocks, beside SDPA,", seconds[SDPA], seconds[OWN], 2.4)
        time = ratio_interval(seconds["forced"], seconds[OWN])
        words = (
            f"{LENGTH} entries: {parts['forced']['density']:.0%} of the blocks take at most 35 % of the time of all: "
            f"{time.estimate:.0%}"
        )
        yield claim(words, time.high <= 0.35, time.estimate <= 0.35)
    for source, tokens, arm in run.texts:
        if tokens == LENGTH and arm in (FLASH, study.ROWS):
            gap = above_dense(run, source, tokens, arm)
            words = f"{tokens} tokens of {source}, {arm}: NLL at most {NLL} above dense: {signed(gap)}"
            yield claim(words, gap.high <= NLL, gap.estimate <= NLL)
    for task in dict.fromkeys(task for task, _, _ in run.tasks):
        dense = task_of(run, task, DENSE)
        for arm in (FLASH, FLASH + STRICT) if len(dense) >= LEAST else ():
            gap = paired_bootstrap(task_of(run, task, arm), dense)
            words = (
                f"{task}, {arm}: at most one item in fifty fewer is right than dense: {gap.estimate:+.1%} "
                f"[{gap.low:+.1%}, {gap.high:+.1%}] of {len(dense)}"
            )
            yield claim(words, gap.estimate >= -ITEMS, False)


def tables(run: Run) -> Iterator[Table]:
    """Text, tasks, times and one layer made up."""
    for source, tokens in dict.fromkeys((source, tokens) for source, tokens, _ in run.texts):
        table = grid(f"Text, {tokens} tokens of {source}", "", "density", "NLL", "above dense [95 %]", numbers=True)
        for (name, length, arm), found in run.texts.items():
            if (name, length) == (source, tokens):
                above = "" if arm == DENSE else signed(above_dense(run, source, tokens, arm))
                table.add_row(arm, f"{found['density']:.1%}", f"{np.mean(found['nll']):.3f}", above)
        yield table
    if run.tasks:
        tasks = list(dict.fromkeys(task for task, _, _ in run.tasks))
        table = grid("Right items and NLL of tasks", "", *tasks, numbers=True)
        for arm in task_arms(run):
            cells = []
            for task in tasks:
                right = task_of(run, task, arm)
                cells.append(f"{right.sum():.0f} of {len(right)}, {task_nll(run, task, arm):.2f}")
            table.add_row(arm, *cells)
        yield table
    for dtype, tokens in dict.fromkeys((dtype, tokens) for dtype, tokens, _ in run.times):
        headings = "", "density", "attention", "x SDPA's", "prompt", "x SDPA's", "choosing"
        table = grid(f"Seconds, {tokens} tokens, {dtype}", *headings, numbers=True)
        base = run.times[dtype, tokens, SDPA]
        for (kind, length, arm), one in run.times.items():
            if (kind, length) == (dtype, tokens):
                ratios = {what: ratio_interval(base[what], one[what]).estimate for what in ("attention", "whole")}
                table.add_row(
                    arm, f"{np.median(one['density']):.1%}", f"{np.median(one['attention']):.2f}",
                    f"{ratios['attention']:.2f}", f"{np.median(one['whole']):.2f}", f"{ratios['whole']:.2f}",
                    "" if arm == SDPA else f"{choosing(one):.1%}",
                )  # fmt: skip
        yield table
    if run.synthetic:
        table = grid("Seconds of one layer's attention, made up", "entries", *study.SYNTHETIC, numbers=True)
        for entries in dict.fromkeys(entries for entries, _ in run.synthetic):
            parts = [run.synthetic[entries, arm] for arm in study.SYNTHETIC]
            table.add_row(str(entries), *(f"{np.median(c['seconds']):.3f} ({c['density']:.0%})" for c in parts))
        yield table


CHECK = study_check(study, result, tables)
