"""The check of Sparse-BitNet: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import sparse_bitnet as study
from lissom.evals.stats import signed
from lissom.report.checks import grid, study_check
from lissom.report.rows import Claim, Result, Row

SOURCE = "arXiv 2603.05168"
_DENSE = {study.FLOAT_SPARSE: study.FLOAT, study.SPARSE: study.TERNARY}
_OVER_TIME = ("zeros", "mask_flips")


def result(run: study.Run) -> Result:
    """Every arm, what the mask costs in floating point and in ternary models, zeros and flips over time, and the
    converted model."""
    rows = [row for arm in run.trained for row in _rows(run, arm)]
    ratio = run.ratio if set(study.MAIN) <= set(run.trained) else None
    if ratio is not None:
        seeds = len(run.nll(study.SPARSE))
        rows.append(Row("training/increase of float over ternary", ratio.estimate, "x", 1.0, ratio.estimate,
                        ratio.low, ratio.high, seeds))  # fmt: skip
    for arm in run.trained:
        for what in _OVER_TIME:
            rows += [Row(f"over time/{arm}/{what}/{step}", value, "") for step, value in run.measured(arm, what)]
    if run.converted:
        rows += _conversion(run)
    facts = describe() | {"steps": run.size.config.steps, "tokens": _tokens(run.size.config)}
    if run.size.conversion is not None:
        facts["conversion tokens"] = _tokens(run.size.conversion.config)
    return Result(
        "sparse-bitnet", rows, [Claim(words, SOURCE, verdict) for words, verdict in study.verdicts(run)], facts
    )


def _tokens(config: study.TrainConfig) -> int:
    return config.steps * config.batch_size * config.gradient_accumulation_steps * config.context


def _rows(run: study.Run, arm: str) -> Iterator[Row]:
    nll, units = run.nll(arm), len(run.nll(arm))
    yield Row(f"training/{arm}/perplexity", float(np.exp(nll.mean())), "", n=units)
    yield Row(f"training/{arm}/perplexity of held-out text", float(np.exp(run.held_out(arm).mean())), "", n=units)
    dense = _DENSE.get(arm)
    if dense in run.trained:
        gap = run.above(arm, dense)
        yield Row(f"training/{arm}/NLL above dense", gap.estimate, "nats", 0.0, None, gap.low, gap.high, units)
    elif arm not in study.MAIN and study.SPARSE in run.trained:
        gap = run.above(arm)
        yield Row(f"training/{arm}/NLL above 2:4", gap.estimate, "nats", 0.0, None, gap.low, gap.high, units)


def _conversion(run: study.Run) -> Iterator[Row]:
    for state in (study.BEFORE, study.ONE_SHOT, study.AFTER):
        nll = np.array(run.converted[state])
        yield Row(f"conversion/{state}/perplexity", float(np.exp(nll.mean())), "", n=len(nll))
        if state != study.BEFORE:
            gap = run.conversion_above(state, study.BEFORE)
            yield Row(
                f"conversion/{state}/NLL above before", gap.estimate, "nats", 0.0, None, gap.low, gap.high, len(nll)
            )


def tables(run: study.Run) -> Iterator[Table]:
    """One table of the arms, one of zeros and flips at some steps, and one of the converted model."""
    title = f"From scratch: {_tokens(run.size.config):,} tokens, {len(run.size.seeds)} seeds"
    if run.size.more_seeds:
        title += f", of the first four arms {len(run.size.seeds) + len(run.size.more_seeds)}"
    table = grid(title, "arm", "perplexity", "NLL above [95 %]", "of", "held out", numbers=True)
    for arm in run.trained:
        base = _DENSE.get(arm, "" if arm in study.MAIN else study.SPARSE)
        gap = signed(run.above(arm, base)) if base in run.trained else ""
        perplexities = [f"{np.exp(values.mean()):.2f}" for values in (run.nll(arm), run.held_out(arm))]
        table.add_row(arm, perplexities[0], gap, base if gap else "", perplexities[1])
    yield table
    columns = [(arm, what) for arm in run.trained for what in _OVER_TIME if run.measured(arm, what)]
    for what in _OVER_TIME:
        arms = [arm for arm, name in columns if name == what]
        if not arms:
            continue
        steps = [step for step, _ in run.measured(arms[0], what)]
        shown = steps[:: max(1, len(steps) // 5)]
        table = grid(f"{what.replace('_', ' ').capitalize()}, by step", "arm", *map(str, shown), numbers=True)
        for arm in arms:
            values = dict(run.measured(arm, what))
            table.add_row(arm, *(f"{values[step]:.1%}" if step in values else "" for step in shown))
        yield table
    if run.converted:
        table = grid("The given model, made ternary 2:4", "", "perplexity", "NLL above before [95 %]", numbers=True)
        for state in (study.BEFORE, study.ONE_SHOT, study.AFTER):
            gap = "" if state == study.BEFORE else signed(run.conversion_above(state, study.BEFORE))
            table.add_row(state, f"{np.exp(np.mean(run.converted[state])):.2f}", gap)
        yield table


CHECK = study_check(study, result, tables)
