"""What the main job found for a diffusion model, as rows and as a table."""

from __future__ import annotations

import numpy as np
from rich.table import Table

from lissom.evals.stats import ratio_interval
from lissom.evolve.pipelines import Outcome
from lissom.report.checks import grid
from lissom.report.rows import Result, Row


def result(outcome: Outcome) -> Result:
    """Loss and time of every recipe."""
    rows = []
    for own in outcome.measured:
        faster = ratio_interval(outcome.base.seconds.tolist(), own.seconds.tolist())
        base = float(np.median(outcome.base.seconds))
        rows += [
            Row(f"{own.recipe.label}/quality loss", own.loss.estimate, "1 - SSIM", 0.0, None, own.loss.low,
                own.loss.high, len(own.losses)),
            Row(f"{own.recipe.label}/time", float(np.median(own.seconds)), "s", base, faster.estimate, faster.low,
                faster.high, len(own.seconds)),
        ]  # fmt: skip
    return Result("optimize-pipeline", rows)


def table(outcome: Outcome) -> Table:
    """Every recipe, those of the front in bold."""
    headings = ("recipe", "loss (1 - SSIM) [95 %]", "seconds", "faster [95 %]")
    shown = grid("Recipes, against the untouched pipeline", *headings, numbers=True)
    front = {own.recipe.label for own in outcome.front}
    for own in outcome.measured:
        faster = ratio_interval(outcome.base.seconds.tolist(), own.seconds.tolist())
        shown.add_row(
            own.recipe.label,
            f"{own.loss.estimate:.3f} [{own.loss.low:.3f}, {own.loss.high:.3f}]",
            f"{float(np.median(own.seconds)):.3f}",
            f"{faster.estimate:.2f}x [{faster.low:.2f}, {faster.high:.2f}]",
            style="bold" if own.recipe.label in front else None,
        )
    return shown
