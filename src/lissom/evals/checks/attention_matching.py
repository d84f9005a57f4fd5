"""Attention matching against every eviction baseline, at equal stored entries, on held-out questions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.fidelity import recalled, score, teach
from lissom.evals.head_budgets import measure_head_budgets
from lissom.evals.journal import Journal, scope
from lissom.evals.needle import needles, recalls
from lissom.evals.perplexity import nll_behind
from lissom.evals.stats import Interval, paired_bootstrap, verdict
from lissom.evals.texts import Document, planted_documents
from lissom.kv import AttentionMatching, Eviction, compact
from lissom.kv.compact import Reading, read
from lissom.kv.compactor import Compactor, Wanted
from lissom.kv.document import document_ids
from lissom.kv.eviction import SCORES
from lissom.kv.influence import load_shares, path_of
from lissom.models import describe_decoder
from lissom.models.assets import corpus

HIGHER_IS_BETTER = ("top1", "recalled")
METRICS = ("output_error", "mass_error", "nll", "kl", "top1", "recalled")
OURS = "attention matching"
Shares = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Size:
    """How much is measured: documents of so many tokens at these ratios; the ablations at theirs; needles of these
    lengths. `seed` picks the documents, each of which has up to eight questions, half of them for planted facts; with
    `recall` a method's own answers to those are generated, too. The text is Python's manual, or the named corpus."""

    documents: int
    tokens: int
    ratios: tuple[float, ...]
    ablation_ratios: tuple[float, ...] = ()
    needle_lengths: tuple[int, ...] = ()
    seed: int = 0
    questions: int = 8
    recall: bool = True
    corpus: str = ""

    def scope(self, model: PreTrainedModel) -> str:
        """What a measurement depends on beside the method, the ratio and the document's number."""
        return scope(model, self.corpus, self.documents, self.tokens, self.seed, self.questions, self.recall)


SMALL = Size(2, 700, (0.1, 0.05))
DEFAULT = Size(5, 1400, (0.2, 0.1, 0.05, 0.02), (0.1,), (500, 1000, 2000))
PAPER = Size(50, 6000, (0.1, 0.05, 0.02, 0.01), (0.05, 0.02), (4000, 16000), corpus="sotu")

NEEDLE_RATIO = 0.1
_NEEDLE_ROOM = 200  # tokens for the chat template, the question and the answer
NEEDLE_DEPTHS = (0.1, 0.5, 0.9)
BASELINES = (*SCORES, "kvzip global")
STAGES = ("head budgets", "methods", "needles")


def arms(ratio: float, size: Size, shares: Shares = ()) -> dict[str, Compactor]:
    """Every method that is compared at one ratio; `shares` are the model's measured head budgets."""
    methods: dict[str, Compactor] = {OURS: AttentionMatching(ratio=ratio)}
    methods |= {name: Eviction(ratio=ratio, score=name) for name in SCORES}
    methods["kvzip global"] = Eviction(ratio=ratio, score="kvzip", budgets="global")
    if ratio in size.ablation_ratios:
        methods |= {
            "no bias": AttentionMatching(ratio=ratio, bias=False),
            "original values": AttentionMatching(ratio=ratio, fit_values=False),
            "random keys": AttentionMatching(ratio=ratio, select="random"),
            "context queries": AttentionMatching(ratio=ratio, queries="context"),
            "self-study": AttentionMatching(ratio=ratio, queries="self-study"),
            "repeat+self-study": AttentionMatching(ratio=ratio, queries="repeat+self-study"),
            "uniform budgets": AttentionMatching(ratio=ratio, budgets="uniform"),
            "uniform, OMP-fast": AttentionMatching(ratio=ratio, budgets="uniform", select="omp-fast"),
            "uniform, on-policy": AttentionMatching(ratio=ratio, budgets="uniform", on_policy=True),
            "published fit": AttentionMatching(ratio=ratio, mass_ridge=0.0, ridge=0.0, fit_below=1.0),
            "published, uniform": AttentionMatching(
                ratio=ratio, mass_ridge=0.0, ridge=0.0, fit_below=1.0, budgets="uniform"
            ),
        }
        if shares:
            methods["measured budgets"] = AttentionMatching(ratio=ratio, budgets="measured", shares=shares)
    return methods


@dataclass(frozen=True)
class Run:
    """What a check measured: see `measure` and `measure_needles`."""

    size: Size
    records: list[dict[str, Any]]
    needles: list[dict[str, Any]]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Run:
    """The whole check, head budgets first where they are among the ablations; resumable.

    Args:
        progress: called with (stage, done, total); the stages are `STAGES`.
    """
    shares: Shares = ()
    if size.ablation_ratios:
        if not path_of(model).is_file():
            measure_head_budgets(model, tokenizer, progress=partial(progress, STAGES[0]))
        shares = load_shares(model)
    chosen = partial(arms, shares=shares)
    records = measure(model, tokenizer, size, journal, partial(progress, STAGES[1]), chosen)
    return Run(size, records, measure_needles(model, tokenizer, size, journal, partial(progress, STAGES[2])))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    arms: Callable[[float, Size], dict[str, Compactor]] = arms,
) -> list[dict[str, Any]]:
    """One record per document, ratio and arm, with a score per question.

    A run that was stopped goes on behind the last whole record in `journal` of the same model, size and settings, on
    the same machine with the same versions.
    """
    key = size.scope(model)
    known = Journal(journal)
    plan = [(ratio, name, method) for ratio in size.ratios for name, method in arms(ratio, size).items()]
    records = []
    source = list(corpus(size.corpus)) if size.corpus else None
    documents = planted_documents(tokenizer, size.documents, size.tokens, size.seed, source)
    others = documents if len(documents) > 1 else planted_documents(tokenizer, 2, size.tokens, size.seed, source)
    for number, document in enumerate(documents):
        lesson = None
        elsewhere = others[number - 1].following
        for place, (ratio, name, method) in enumerate(plan):
            identity = f"{key}/{number}/{json.dumps(method.settings(), sort_keys=True)}"
            if identity not in known:
                lesson = lesson or Lesson(model, tokenizer, document, elsewhere, size)
                known.add(identity, {"document": number, **lesson.record(method)})
            records.append({**known[identity], "ratio": ratio, "arm": name})
            progress(number * len(plan) + place + 1, size.documents * len(plan))
    return records


class Lesson:
    """One document with the full cache's answers. What several methods can share is computed once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        document: Document,
        elsewhere: str,
        size: Size,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ids = document_ids(tokenizer, document.text)
        self.elsewhere = tokenizer(elsewhere, return_tensors="pt", add_special_tokens=False)["input_ids"]
        self.full = read(model, self.ids)
        facts = size.questions // 2  # they come first, the open questions last
        asked = document.questions[:facts] + document.questions[facts - size.questions :]
        if not size.recall:
            asked = tuple(replace(question, answer=None) for question in asked)
        self.teachers = teach(model, tokenizer, self.ids, self.full, asked)
        self._readings: dict[Wanted, tuple[Reading, float]] = {}

    def record(self, method: Compactor) -> dict[str, Any]:
        """Scores, seconds (of reading with its passes, and of the fit) and bytes of one method."""
        start = time.perf_counter()
        if method.on_policy:
            cache, reading_seconds = compact(self.model, self.ids, method, tokenizer=self.tokenizer), 0.0
        else:
            reading, reading_seconds = self._reading(method)
            start = time.perf_counter()
            cache = reading.compact(method)
        seconds = time.perf_counter() - start
        return {
            "read_seconds": reading_seconds,
            "fit_seconds": seconds,
            "bytes": cache.stored_bytes,
            "full_bytes": self.full.stored_bytes,
            "off_context": float(nll_behind(self.model, cache, self.elsewhere).mean()),
            "full_off_context": float(nll_behind(self.model, self.full, self.elsewhere).mean()),
            "scores": [asdict(s) for s in score(self.model, self.tokenizer, self.ids, cache, self.teachers)],
            "full_recalled": [
                None if t.question.answer is None else recalled(self.tokenizer, t, t.ids) for t in self.teachers
            ],
        }

    def _reading(self, method: Compactor) -> tuple[Reading, float]:
        key = method.evidence
        if key not in self._readings:
            start = time.perf_counter()
            reading = Reading.of(self.model, self.ids, method, tokenizer=self.tokenizer)
            self._readings[key] = reading, time.perf_counter() - start
        return self._readings[key]


def measure_needles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Per needle: whether the full cache and each method at `NEEDLE_RATIO` find it; resumable as `measure`.

    Lengths beyond the model's context are left out.
    """
    room = describe_decoder(model).max_position_embeddings - _NEEDLE_ROOM
    lengths = [length for length in size.needle_lengths if length <= room]
    known, key = Journal(journal), size.scope(model)
    methods: dict[str, Compactor] = {OURS: AttentionMatching(ratio=NEEDLE_RATIO)}
    methods |= {name: Eviction(ratio=NEEDLE_RATIO, score=name) for name in ("h2o", "snapkv", "streaming-llm")}
    methods["kvzip global"] = Eviction(ratio=NEEDLE_RATIO, score="kvzip", budgets="global")
    total = len(lengths) * len(NEEDLE_DEPTHS)
    records = []
    for number, needle in enumerate(needles(tokenizer, lengths, NEEDLE_DEPTHS, size.seed)):
        settings = json.dumps([method.settings() for method in methods.values()], sort_keys=True)
        identity = f"needle/{key}/{needle.length}/{needle.depth}/{needle.code}/{settings}"
        if identity not in known:
            found = {"full": recalls(model, tokenizer, needle, read(model, needle.ids))}
            for name, method in methods.items():
                cache = compact(model, needle.ids, method, tokenizer=tokenizer)
                found[name] = recalls(model, tokenizer, needle, cache)
            known.add(identity, {"length": needle.length, "depth": needle.depth, "found": found})
        records.append(known[identity])
        progress(number + 1, total)
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

    `holds`: the interval of the difference to the best baseline excludes 0 at every ratio (for "at least as well": it
    does not lie below 0); `weaker`: the mean is no worse at every ratio; otherwise `does not hold`.
    """
    claims = []
    low = tuple(ratio for ratio in size.ratios if ratio <= 0.05)
    for metric, ratios, words in (
        ("output_error", size.ratios, "lower held-out output error than every eviction baseline"),
        ("nll", low, "lower NLL of the full cache's answers than every eviction baseline at 5 % and less"),
        ("kl", low, "lower KL to the full cache than every eviction baseline at 5 % and less"),
        ("recalled", size.ratios, "recalls planted strings at least as well as every eviction baseline"),
    ):
        if not ratios:
            continue
        worst = [
            max((_behind(records, ratio, name, metric) for name in BASELINES), key=lambda gap: gap.estimate)
            for ratio in ratios
        ]
        claims.append((words, verdict(worst, strict=metric not in HIGHER_IS_BETTER)))
    return claims


def _behind(records: Sequence[dict[str, Any]], ratio: float, arm: str, metric: str) -> Interval:
    """By how much ours is worse than `arm`."""
    gap = against(records, ratio, arm, metric)
    return Interval(-gap.estimate, -gap.high, -gap.low) if metric in HIGHER_IS_BETTER else gap
