"""The page of the main job for a diffusion model."""

from __future__ import annotations

import numpy as np

from lissom.diffusion.klein_kv import KleinKV
from lissom.evolve.pipelines import Measured, Outcome
from lissom.recipes import Recipe
from lissom.report.pipelines import page, table


def outcome(*found: tuple[int, float, float], untried=()) -> Outcome:
    """Of recipes with so many steps, a loss, and seconds."""
    measured = [
        Measured(
            Recipe.of(*([KleinKV()] if loss else []), model="<a>", steps=steps), np.full(4, loss), np.full(4, time)
        )
        for steps, loss, time in found
    ]
    return Outcome(measured, 0.02, list(untried))


def test_the_fastest_within_the_floor_is_recommended():
    found = outcome((20, 0.0, 4.0), (12, 0.01, 2.0), (8, 0.3, 1.0), (6, 0.4, 1.5))
    html = page(found, "<a>", "lissom edit X")
    assert found.best is found.measured[1] and [own.recipe.steps for own in found.front] == [20, 12, 8]
    assert "2.00×" in html and "2.00 s instead of 4.00 s" in html and "1.0%" in html and "lissom edit X" in html
    assert html.count("&lt;a&gt;") >= 2 and "<a>" not in html and "{{" not in html.partition("plotly")[0]
    assert html.count('class="beaten"') == 1 and html.count('class="best"') == 1 and html.count('class="front"') == 2
    assert table(found).row_count == 4


def test_where_nothing_helps_that_is_said():
    html = page(outcome((20, 0.0, 4.0), (12, 0.1, 2.0), untried=["8 steps"]), "a", "command")
    assert "Nothing measured was faster" in html and "Not tried yet: 8 steps." in html
