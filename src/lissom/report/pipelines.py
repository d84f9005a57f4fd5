"""What the main job found for a diffusion model: rows, a table, a page."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go
from rich.table import Table

from lissom.evals.stats import Interval, ratio_interval
from lissom.evolve.pipelines import Measured, Outcome
from lissom.report.checks import grid
from lissom.report.page import cards, filled, html_table, layout, measured_on
from lissom.report.rows import Result, Row

_HEADINGS = ("recipe", "loss (1 - SSIM) [95 %]", "seconds", "faster [95 %]")


def result(outcome: Outcome) -> Result:
    """Loss and time of every recipe."""
    rows = []
    for own in outcome.measured:
        faster = _faster(outcome, own)
        rows += [
            Row(f"{own.recipe.label}/quality loss", own.loss.estimate, "1 - SSIM", 0.0, None, own.loss.low,
                own.loss.high, len(own.losses)),
            Row(f"{own.recipe.label}/time", own.time, "s", outcome.base.time, faster.estimate, faster.low,
                faster.high, len(own.seconds)),
        ]  # fmt: skip
    return Result("optimize-pipeline", rows)


def table(outcome: Outcome) -> Table:
    """Every recipe, those of the front in bold."""
    shown = grid(f"Recipes, against {_base(outcome)}", *_HEADINGS, numbers=True)
    for own in outcome.measured:
        shown.add_row(*_cells(outcome, own), style="bold" if own in outcome.front else None)
    return shown


def page(outcome: Outcome, name: str, command: str) -> str:
    """All of it as one HTML file that needs nothing else.

    Args:
        name: of the pipeline.
        command: how the recommended recipe is used.
    """
    base, best = outcome.base, outcome.best
    words = f"Nothing measured was faster than {escape(_base(outcome))} within the accepted loss."
    if best is not base:
        words = f"Recommended: <b>{escape(best.recipe.label)}</b>."
    if outcome.untried:
        words += f" Not tried yet: {escape(', '.join(outcome.untried))}."
    facts = [
        (f"{base.time / best.time:.2f}×", "speed of a picture", f"{best.time:.2f} s instead of {base.time:.2f} s"),
        (f"{best.loss.estimate:.1%}", "quality loss", f"accepted: {outcome.max_loss:.1%}"),
        (f"{best.recipe.steps}", "steps", f"instead of {base.recipe.steps}"),
    ]
    rows = [
        ("best" if own is best else "front" if own in outcome.front else "beaten", _cells(outcome, own))
        for own in sorted(outcome.measured, key=lambda own: own.time)
    ]
    parts = {
        "model": escape(name),
        "device": "this machine",
        "verdict": words,
        "cards": cards(facts),
        "command": escape(command),
        "recipe": escape(best.recipe.to_yaml()),
        "table": html_table(_HEADINGS, rows),
        "base": escape(_base(outcome)),
        "requests": "refine small pictures of held-out emoji" if outcome.refine else "edit held-out emoji",
        "facts": measured_on(),
    }
    return filled("pipelines.html", parts, [_plot(outcome)])


def _base(outcome: Outcome) -> str:
    """What all are judged by."""
    return outcome.base.recipe.label if outcome.refine else "the untouched pipeline"


def _plot(outcome: Outcome) -> go.Figure:
    figure = go.Figure(layout=layout("Speed against quality", "quality loss (%)", "seconds of a picture"))
    for name, chosen in (("on the front", True), ("another is better", False)):
        group = [own for own in outcome.measured if (own in outcome.front) == chosen]
        figure.add_scatter(
            x=[100 * own.loss.estimate for own in group],
            y=[own.time for own in group],
            mode="markers",
            name=name,
            marker={
                "size": [18 if own is outcome.best else 11 for own in group],
                "symbol": ["star" if own is outcome.best else "circle" for own in group],
                "opacity": 1.0 if chosen else 0.4,
            },
            text=[escape(own.recipe.label) for own in group],
            hovertemplate="%{text}<br>%{x:.2f} %, %{y:.2f} s<extra></extra>",
        )
    figure.add_vline(x=100 * outcome.max_loss, line={"dash": "dot"}, annotation_text="accepted loss")
    return figure


def _cells(outcome: Outcome, own: Measured) -> tuple[str, ...]:
    faster = _faster(outcome, own)
    return (
        own.recipe.label,
        f"{own.loss.estimate:.3f} [{own.loss.low:.3f}, {own.loss.high:.3f}]",
        f"{own.time:.3f}",
        f"{faster.estimate:.2f}x [{faster.low:.2f}, {faster.high:.2f}]",
    )


def _faster(outcome: Outcome, own: Measured) -> Interval:
    return ratio_interval(outcome.base.seconds.tolist(), own.seconds.tolist())
