"""Attention matching against every eviction baseline, at equal stored entries, on held-out questions."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.fidelity import score, teach
from lissom.evals.journal import Journal
from lissom.evals.stats import Interval, paired_bootstrap
from lissom.evals.texts import planted_documents
from lissom.kv import AttentionMatching, Eviction, compact
from lissom.kv.compactor import Compactor
from lissom.kv.document import document_ids
from lissom.kv.eviction import SCORES
from lissom.models import fingerprint

METRICS = ("output_error", "mass_error", "nll", "kl", "top1", "recalled")
OURS = "attention matching"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    documents: int
    tokens: int
    ratios: tuple[float, ...]
    ablations: bool
    pursuits: bool


SMALL = Size(2, 700, (0.1, 0.05), False, False)
DEFAULT = Size(6, 1400, (0.2, 0.1, 0.05, 0.02), True, True)
PAPER = Size(50, 6000, (0.1, 0.05, 0.02, 0.01), True, True)


def arms(ratio: float, size: Size) -> dict[str, Compactor]:
    """Every method that is compared at one ratio."""
    methods: dict[str, Compactor] = {OURS: AttentionMatching(ratio=ratio)}
    methods |= {name: Eviction(ratio=ratio, score=name) for name in SCORES}
    if size.pursuits:
        methods["OMP-fast"] = AttentionMatching(ratio=ratio, select="omp-fast")
    if size.ablations:
        methods |= {
            "no bias": AttentionMatching(ratio=ratio, bias=False),
            "original values": AttentionMatching(ratio=ratio, fit_values=False),
            "random keys": AttentionMatching(ratio=ratio, select="random"),
            "context queries": AttentionMatching(ratio=ratio, queries="context"),
            "ridge 0": AttentionMatching(ratio=ratio, ridge=0.0),
            "ridge to original values": AttentionMatching(ratio=ratio, prior="original"),
            "exact mass fit": AttentionMatching(ratio=ratio, exact=True),
            "4096 queries": AttentionMatching(ratio=ratio, max_queries=4096),
            "on-policy": AttentionMatching(ratio=ratio, on_policy=True),
        }
    return methods


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One record per document, ratio and arm, with a score per question.

    Each record is appended to `journal` (JSON lines) as soon as it is measured, and a run that was stopped goes on
    behind the last whole record of the same model, size and settings.
    """
    key = hashlib.sha256(repr((fingerprint(model), size.tokens)).encode()).hexdigest()[:12]
    known = Journal(journal)
    plan = [(ratio, name, method) for ratio in size.ratios for name, method in arms(ratio, size).items()]
    records = []
    for number, document in enumerate(planted_documents(tokenizer, size.documents, size.tokens)):
        ids = document_ids(tokenizer, document.text)
        full = teachers = None
        for place, (ratio, name, method) in enumerate(plan):
            identity = f"{key}/{number}/{json.dumps(method.settings(), sort_keys=True)}"
            if identity not in known:
                if full is None or teachers is None:
                    full = compact(model, ids, AttentionMatching(ratio=1.0, queries="context"))
                    teachers = teach(model, tokenizer, ids, full, document.questions)
                start = time.perf_counter()
                cache = compact(model, ids, method, tokenizer=tokenizer)
                record = {
                    "document": number,
                    "ratio": ratio,
                    "arm": name,
                    "seconds": time.perf_counter() - start,
                    "bytes": cache.stored_bytes,
                    "full_bytes": full.stored_bytes,
                    "scores": [asdict(score(model, tokenizer, ids, cache, teacher)) for teacher in teachers],
                    "full_recalled": [
                        None if t.question.answer is None else t.question.answer.lower() in t.answer.lower()
                        for t in teachers
                    ],
                }
                known.add(identity, record)
            records.append({**known[identity], "ratio": ratio, "arm": name})
            progress(number * len(plan) + place + 1, size.documents * len(plan))
    return records


def per_question(records: Sequence[dict[str, Any]], ratio: float, arm: str, metric: str) -> np.ndarray:
    """One number per question, in the order of documents and questions; open questions have no recall."""
    values = [
        s[metric]
        for r in records
        if r["ratio"] == ratio and r["arm"] == arm
        for s in r["scores"]
        if s[metric] is not None
    ]
    return np.array(values, dtype=float)


def against(records: Sequence[dict[str, Any]], ratio: float, arm: str, metric: str) -> Interval:
    """Ours minus `arm`, paired by question."""
    return paired_bootstrap(per_question(records, ratio, OURS, metric), per_question(records, ratio, arm, metric))


def verdicts(records: Sequence[dict[str, Any]], size: Size) -> list[tuple[str, str]]:
    """(claim, verdict) for output error, NLL and recall against the best baseline of each ratio.

    `holds`: the interval of the difference to the best baseline excludes 0 at every ratio; `weaker`: the mean is
    better at every ratio; otherwise `does not hold`.
    """
    claims = []
    low = tuple(ratio for ratio in size.ratios if ratio <= 0.05)
    for metric, ratios, sign, words in (
        ("output_error", size.ratios, 1, "lower held-out output error than every eviction baseline"),
        ("nll", low, 1, "lower NLL of the full cache's answers than every eviction baseline at 5 % and less"),
        ("kl", low, 1, "lower KL to the full cache than every eviction baseline at 5 % and less"),
        ("recalled", size.ratios, -1, "recalls planted strings at least as well as every eviction baseline"),
    ):
        worst = [
            max((against(records, ratio, name, metric) for name in SCORES), key=lambda i, s=sign: s * i.estimate)  # type: ignore[misc]
            for ratio in ratios
        ]
        bounds = [i.high if sign == 1 else -i.low for i in worst]
        means = [sign * i.estimate for i in worst]
        verdict = "holds" if max(bounds) < 0 else "weaker" if max(means) <= 0 else "does not hold"
        claims.append((words, verdict))
    return claims
