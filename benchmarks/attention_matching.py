"""Attention matching against every eviction baseline at equal stored entries, and what reading, repeating and fitting
take beside the prefill. The same comparison as `lissom check attention-matching`."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import lissom
from lissom.cli.check import journal_of, measured, show
from lissom.devices.meters import interleaved
from lissom.evals.checks import attention_matching as study
from lissom.evals.texts import planted_documents
from lissom.kv import AttentionMatching, Eviction
from lissom.kv.compact import Reading
from lissom.kv.document import document_ids
from lissom.models.load import DEFAULT_MODEL
from lissom.report.checks.attention_matching import CHECK
from lissom.report.rows import Row


def times(tokens: int, quick: bool, dtype: str) -> list[Row]:
    """Seconds of each stage on one document, interleaved with the plain prefill of the same model."""
    model, tokenizer = lissom.load(dtype=dtype)
    ids = document_ids(tokenizer, planted_documents(tokenizer, 1, tokens)[0].text)
    readings = {
        queries: Reading.of(model, ids, AttentionMatching(max_queries=queries), tokenizer=tokenizer)
        for queries in (AttentionMatching.max_queries, 2048)
    }
    methods = {f"fit {ratio:.0%}": AttentionMatching(ratio=ratio) for ratio in (0.2, 0.1, 0.05)}
    methods["fit 10% (2048 queries)"] = AttentionMatching(ratio=0.1, max_queries=2048)
    methods["select 10% (kvzip global)"] = Eviction(ratio=0.1, score="kvzip", budgets="global")
    methods["fit 10% (uniform)"] = AttentionMatching(ratio=0.1, budgets="uniform")

    def timed(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def prefill():
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)

    arms = {"prefill": lambda: timed(prefill)}
    arms |= {
        name: (lambda m=method: timed(lambda: readings[m.max_queries].compact(m))) for name, method in methods.items()
    }
    arms["read and repeat"] = lambda: timed(lambda: Reading.of(model, ids, AttentionMatching(), tokenizer=tokenizer))
    measured: dict[str, list[float]] = {name: [] for name in arms}
    for work in arms.values():
        work()
    for name, seconds in interleaved(arms, 2 if quick else 5):
        measured[name].append(seconds)
    base = statistics.median(measured["prefill"])
    rows = []
    for name, seconds in measured.items():
        value = statistics.median(seconds)
        rows.append(
            Row(f"time/{dtype}/{name}", value, "s", base, base / value, min(seconds), max(seconds), len(seconds))
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short document, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--journal", type=Path, default=journal_of("attention-matching"))
    given = parser.parse_args()
    size = replace(study.SMALL, documents=1, tokens=200, ratios=(0.1,), questions=2) if given.quick else study.DEFAULT
    seconds = [  # first, while nothing has heated or filled the machine
        row for dtype in ("float32", "bfloat16") for row in times(200 if given.quick else 1400, given.quick, dtype)
    ]
    outcome = measured(CHECK.stages, partial(CHECK.measure, size), DEFAULT_MODEL, given.journal)
    outcome.result.rows.extend(seconds)
    show(outcome, given.json)
    for row in seconds if given.json != "-" else ():
        print(f"{row.name[5:]:32s} {row.value:7.2f} s   {row.value / row.baseline:5.2f} of the prefill's time")


if __name__ == "__main__":
    main()
