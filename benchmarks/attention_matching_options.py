"""What the defaults of attention matching were chosen from: documents that `lissom check` does not use."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import lissom
from lissom.evals.checks import attention_matching as study
from lissom.evals.stats import paired_bootstrap
from lissom.kv import AttentionMatching
from lissom.kv.compactor import Compactor
from lissom.report.rows import Result, Row

SIZE = study.Size(documents=2, tokens=1200, ratios=(0.2, 0.1, 0.05), seed=1, recall=False)
REFERENCE = "published fit"


def arms(ratio: float, size: study.Size) -> dict[str, Compactor]:
    """The default, the options that it was chosen from, and other ways of selecting keys."""
    return {
        study.OURS: AttentionMatching(ratio=ratio),
        REFERENCE: AttentionMatching(ratio=ratio, mass_ridge=0.0, ridge=0.0, fit_below=1.0),
        "published, uniform": AttentionMatching(
            ratio=ratio, mass_ridge=0.0, ridge=0.0, fit_below=1.0, budgets="uniform"
        ),
        "every head fitted": AttentionMatching(ratio=ratio, fit_below=1.0),
        "fit below 0.25": AttentionMatching(ratio=ratio, fit_below=0.25),
        "no mass ridge": AttentionMatching(ratio=ratio, mass_ridge=0.0),
        "ridge to zero": AttentionMatching(ratio=ratio, prior="zero"),
        "exact mass fit": AttentionMatching(ratio=ratio, mass_ridge=0.0, exact=True),
        "2048 queries": AttentionMatching(ratio=ratio, max_queries=2048),
        "mass ridge 1e-3": AttentionMatching(ratio=ratio, mass_ridge=1e-3),
        "mass ridge 1e-1": AttentionMatching(ratio=ratio, mass_ridge=1e-1),
        "ridge 1e-2": AttentionMatching(ratio=ratio, ridge=1e-2),
        "repeat+self-study": AttentionMatching(ratio=ratio, queries="repeat+self-study"),
        "uniform budgets": AttentionMatching(ratio=ratio, budgets="uniform"),
        "uniform, OMP-fast": AttentionMatching(ratio=ratio, budgets="uniform", select="omp-fast"),
        "uniform, on-policy": AttentionMatching(ratio=ratio, budgets="uniform", on_policy=True),
        "max instead of rms": AttentionMatching(ratio=ratio, reduce="max"),
        "pool 7": AttentionMatching(ratio=ratio, pool=7),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short document, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--journal", type=Path, default=Path("lissom-check/attention-matching-options.jsonl"))
    given = parser.parse_args()
    size = replace(SIZE, documents=1, tokens=200, ratios=(0.1,), questions=2) if given.quick else SIZE
    model, tokenizer = lissom.load()
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=None)
        records = study.measure(
            model, tokenizer, size, given.journal, lambda d, t: bar.update(task, completed=d, total=t), arms
        )
    rows = []
    table = Table("option", "ratio", "output error", "NLL", "NLL minus the published fit's [95 %]", "KL", "seconds")
    for ratio in size.ratios:
        reference = study.per_question(records, ratio, REFERENCE, "nll")
        for name in arms(ratio, size):
            own = [r for r in records if r["ratio"] == ratio and r["arm"] == name]
            seconds = math.fsum(r["fit_seconds"] for r in own) / len(own)
            nll = study.per_question(records, ratio, name, "nll")
            gap = paired_bootstrap(nll, reference)
            error, kl = (float(study.per_question(records, ratio, name, m).mean()) for m in ("output_error", "kl"))
            interval = f"{gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
            table.add_row(
                name, f"{ratio:.0%}", f"{error:.3f}", f"{nll.mean():.3f}", interval, f"{kl:.3f}", f"{seconds:.1f}"
            )
            rows.append(
                Row(f"{ratio}/{name}/NLL", float(nll.mean()), "nats", float(reference.mean()),
                    float(reference.mean() / nll.mean()), gap.low, gap.high, len(nll))
            )  # fmt: skip
    if given.json:
        Result("attention-matching-options", rows).write(given.json)
    if given.json != "-":
        Console().print(table)


if __name__ == "__main__":
    main()
