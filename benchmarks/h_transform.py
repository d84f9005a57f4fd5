"""What it costs to refine a guide: times of drawing with each method, over those of drawing without a guide.

Weights are random, which does not change how long they take.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lissom.diffusion.demo.model import new_pipeline
from lissom.diffusion.load import accelerated
from lissom.evals.checks.h_transform import DETERMINISTIC, FREE, STRENGTHS, arms_of, drawn
from lissom.evals.guides import requests
from lissom.evals.reference_speed import random_emoji
from lissom.evals.stats import Interval, ratio_interval
from lissom.evals.training_steps import rounds_of
from lissom.report.rows import Result, Row
from lissom.train.dit import FULL, SMALL

GUIDES = ("low resolution", "missing region")
PICTURES, STEPS = 8, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small model, two rounds")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    form, rounds = (SMALL, 2) if given.quick else (FULL, 7)
    emoji = random_emoji(form.shape.size)
    pipeline = accelerated(new_pipeline(replace(form.shape, references="joint"), emoji))
    methods = [method for method in STRENGTHS if method != "img2img"]
    found: dict[str, dict[str, Interval]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for guide, request in requests(emoji, GUIDES, PICTURES):
            allowed = {method for method, _ in arms_of(request.how, DETERMINISTIC)}
            arms = [(FREE, 0.0), *((method, STRENGTHS[method][1]) for method in methods if method in allowed)]
            works = {arm[0]: partial(drawn, pipeline, request, arm, DETERMINISTIC, STEPS, 0) for arm in arms}
            task = progress.add_task(guide, total=rounds)
            seconds = rounds_of(works, rounds, lambda done, total, task=task: progress.update(task, completed=done))
            found[guide] = {name: ratio_interval(own, seconds[FREE]) for name, own in seconds.items() if name != FREE}
    if given.json:
        rows = [
            Row(f"{guide}/{method}", own.estimate, "x", None, None, own.low, own.high, rounds)
            for guide, methods_found in found.items()
            for method, own in methods_found.items()
        ]
        Result("h-transform-cost", rows, []).write(given.json)
    if given.json != "-":
        table = Table("", *GUIDES, box=SIMPLE, title="Time over that of drawing without a guide [95 %]")
        for method in methods:
            own = [found[guide].get(method) for guide in GUIDES]
            table.add_row(method, *("" if r is None else f"{r.estimate:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in own))
        Console().print(table)


if __name__ == "__main__":
    main()
