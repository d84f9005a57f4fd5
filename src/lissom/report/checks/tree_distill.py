"""The check of tree-search distillation: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import tree_distill as study
from lissom.evals.stats import mean_interval, signed
from lissom.report.checks import grid, model_or_none, study_check
from lissom.report.rows import Claim, Result, Row

_LEARNED = (("mean", "mean@K"), ("best", "pass@K"), ("steps", "updates"))


def result(run: study.Run) -> Result:
    """The puzzle by variant, what searches find before anything is learned, and what each policy came to."""
    facts = describe() | {
        "policy": dict(run.policy),
        "tokens": run.size.config.token_budget,
        "held out": run.size.held_out,
        "simulations": run.size.simulations,
    }
    rows = [
        Row(f"puzzle/{variant}/{budget}/{what}", share, "", n=run.size.puzzles)
        for variant, budgets in run.puzzle.items()
        for budget, shares in budgets.items()
        for what, share in shares.items()
    ]
    for what in ("searched", "mean", "best"):
        rows.append(Row(f"lift/{what}", float(np.mean(run.lift[what])), "", n=run.size.lifted))
    for base in ("mean", "best"):
        gap = run.lifted(base)
        rows.append(Row(f"lift/above {base}", gap.estimate, "", 0.0, None, gap.low, gap.high, run.size.lifted))
    rows.append(Row("lift/tokens of a problem", float(run.lift["tokens"]), ""))
    for arm in run.trained:
        for name, words in (*_LEARNED, ("before", "mean@K before")):
            found = mean_interval(run.final(arm, name))
            rows.append(
                Row(
                    f"learning/{arm}/{words}",
                    found.estimate,
                    "",
                    None,
                    None,
                    found.low,
                    found.high,
                    len(run.size.seeds),
                )
            )
    claims = [Claim(words, source, verdict) for words, source, verdict in study.verdicts(run)]
    return Result("tree-distill", rows, claims, facts)


def tables(run: study.Run) -> Iterator[Table]:
    """The same, for the terminal."""
    title = f"The puzzle, four numbers, {run.size.puzzles} problems: seen / by visits / the best"
    table = grid(title, "search", *(f"{budget} simulations" for budget in run.size.budgets), numbers=True)
    for variant, budgets in run.puzzle.items():
        cells = [
            " / ".join(f"{shares[w]:.2f}" for w in ("seen", "visits", "best") if w in shares)
            for shares in budgets.values()
        ]
        table.add_row(variant, *cells)
    yield table
    title = f"Before learning, {run.lift['tokens']:.0f} tokens for each of {run.size.lifted} problems"
    table = grid(title, "", "solved", "search above it [95 %]", numbers=True)
    table.add_row("search", f"{np.mean(run.lift['searched']):.3f}", "")
    table.add_row("a sample", f"{np.mean(run.lift['mean']):.3f}", signed(run.lifted("mean")))
    table.add_row(
        f"best of {run.lift['samples']} samples", f"{np.mean(run.lift['best']):.3f}", signed(run.lifted("best"))
    )
    yield table
    title = f"Countdown: {run.size.config.token_budget:,} generated tokens, {len(run.size.seeds)} seeds"
    table = grid(title, "arm", *(words for _, words in _LEARNED), "mean@K below tree search [95 %]", numbers=True)
    before = [
        np.mean([r[name] for records in run.trained.values() for r in records]) for name in ("before", "best before")
    ]
    table.add_row("before", *(f"{value:.3f}" for value in before), "", "")
    for arm in run.trained:
        gap = "" if arm == study.SEARCHED else signed(run.gap(study.SEARCHED, arm, "mean"))
        cells = [f"{run.final(arm, name).mean():.3f}" for name, _ in _LEARNED[:2]]
        table.add_row(arm, *cells, f"{run.final(arm, 'steps').mean():.0f}", gap)
    yield table


CHECK = study_check(study, result, tables, model=None, load=model_or_none)
