"""The check of V_0.5: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import v05 as study
from lissom.evals.stats import mean_interval, signed
from lissom.report.checks import grid, model_or_none, study_check
from lissom.report.rows import Claim, Result, Row

_LEARNED = (
    ("mean", "mean@K"), ("best", "pass@K"), ("area", "mean@K over tokens"), ("silent", "silent prompts"),
    ("rollouts", "rollouts"), ("accepted", "prior believed"), ("norm", "gradient"), ("spread", "its spread"),
)  # fmt: skip
_BASELINES = ("prior", "mean", "shrunk", "fused")


def result(run: study.Run) -> Result:
    """The simulation, the rates that were tried, and what each policy came to."""
    facts = describe() | {
        "rates": {arm: run.rates[arm] for arm in (study.GRPO_4, study.V05)},
        "policy": dict(run.policy),
        "tokens": run.size.config.token_budget,
        "held out": run.size.held_out,
        "draws": run.size.draws,
    }
    rows = [
        Row(f"simulation/{prior}/{baseline}", value, "")
        for prior, errors in run.errors.items()
        for baseline, value in errors.items()
    ]
    rows += [Row(f"silent/{baseline}", share, "") for baseline, share in run.silent.items()]
    for way, (size, error) in run.budgets.items():
        rows += [Row(f"budget/{way}/rollouts", size, ""), Row(f"budget/{way}/error", error, "")]
    for arm, rates in run.rates["tuning"].items():
        rows += [Row(f"tuning/{arm}/{rate:g}", reached, "mean@K") for rate, reached in rates.items()]
    for arm in run.trained:
        for name, words in _LEARNED:
            values = run.final(arm, name)
            if np.isfinite(values).all():
                found = mean_interval(values)
                rows.append(
                    Row(f"learning/{arm}/{words}", found.estimate, "", None, None, found.low, found.high, len(values))
                )
        rows += [Row(f"learning/{arm}/curve/{number}", y, "mean@K") for number, y in enumerate(_curve(run, arm))]
    claims = [Claim(words, source, verdict) for words, source, verdict in study.verdicts(run)]
    return Result("v05", rows, claims, facts)


def _curve(run: study.Run, arm: str) -> list[float]:
    """mean@K at each measurement, mean over seeds; as many as all have."""
    curves: list[list[Any]] = [record["curve"] for record in run.trained[arm]]
    return [float(np.mean([curve[n][1] for curve in curves])) for n in range(min(map(len, curves)))]


def tables(run: study.Run) -> Iterator[Table]:
    """The simulation, what budgets buy, and what was learned."""
    table = grid("Simulation: squared error of baselines of 4 rollouts", "prior", *_BASELINES, numbers=True)
    for prior, errors in run.errors.items():
        table.add_row(prior, *(f"{errors[baseline]:.4f}" for baseline in _BASELINES))
    table.add_row("silent prompts, the last", *(f"{run.silent[baseline]:.0%}" for baseline in _BASELINES))
    yield table
    table = grid("Simulation: what rollouts buy", "", "rollouts of a prompt", "error", numbers=True)
    for way, (size, error) in run.budgets.items():
        table.add_row(way, f"{size:.2f}", f"{error:.4f}")
    yield table
    title = f"Countdown: {run.size.config.token_budget:,} generated tokens, {len(run.size.seeds)} seeds"
    table = grid(title, "arm", *(words for _, words in _LEARNED), "mean@K above GRPO, 4 [95 %]", numbers=True)
    for arm in run.trained:
        base = study.GRPO_4
        gap = "" if arm == base or base not in run.trained else signed(run.gap(arm, base, "mean"))
        table.add_row(arm, *(_cell(run.final(arm, name)) for name, _ in _LEARNED), gap)
    yield table


def _cell(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" if np.isfinite(values).all() else ""


CHECK = study_check(study, result, tables, model=None, load=model_or_none)
