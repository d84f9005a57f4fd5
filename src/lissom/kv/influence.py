"""Measured head budgets: how much each KV head needs, found once per model (attention matching, head budgets).

For every layer and KV head an influence curve is measured: the change of the reference answers' mean NLL when only
this head keeps another share of its entries and all others stay at a small uniform one. The same total then goes where
it helps most. Heads are taken to be separable, as in the paper; its 51 points per curve are a handful here.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.files import atomic_path, require_writable
from lissom.kv.attention_matching import AttentionMatching
from lissom.kv.cache import CompactCache
from lissom.kv.compact import Reading, compact_layer
from lissom.kv.head_budgets import solve_shares
from lissom.models import fingerprint
from lissom.models.assets import cache_dir

RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
BASELINE = 0.05


@dataclass(frozen=True)
class Lesson:
    """A document `[1, tokens]` and questions with their reference answers, each `[1, tokens]`; the first `starts[i]`
    tokens of each are the question."""

    document: torch.Tensor
    answered: Sequence[torch.Tensor]
    starts: Sequence[int]


def path_of(model: PreTrainedModel) -> Path:
    """Where a model's shares are kept: in the user's cache, by fingerprint."""
    return cache_dir() / "head-budgets" / f"{fingerprint(model)}.json"


def load_shares(model: PreTrainedModel) -> tuple[tuple[float, ...], ...]:
    """Shares `[layers][heads]` that `measure_shares` found for this model.

    Raises:
        UserError: they were not measured yet, or the file is damaged.
    """
    path = path_of(model)
    if not path.is_file():
        raise UserError("No head budgets were measured for this model: run `lissom budgets MODEL` once.")
    try:
        return tuple(tuple(float(share) for share in layer) for layer in json.loads(path.read_text())["shares"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove it and run `lissom budgets MODEL` again.") from error


@torch.no_grad()
def measure_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lessons: Sequence[Lesson],
    ratios: Sequence[float] = RATIOS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Measure all curves, solve for the shares and keep both; a stopped run goes on with the next layer.

    Returns:
        `[layers, heads]`, sum 1.
    """
    require_writable(path_of(model))
    part = path_of(model).with_suffix(".part.json")
    texts = hashlib.sha256(repr([lesson.document.tolist() for lesson in lessons]).encode()).hexdigest()[:16]
    curves = _partial(part, ratios, texts)
    method = AttentionMatching(ratio=BASELINE, budgets="uniform")
    readings = [Reading.of(model, lesson.document, method, tokenizer=tokenizer) for lesson in lessons]
    bases = [reading.compact(method) for reading in readings]
    start = np.mean([_nll(model, base, lesson) for base, lesson in zip(bases, lessons, strict=True)])
    layers, heads = len(bases[0].compact_layers()), bases[0].heads
    for layer in range(len(curves), layers):
        rows = []
        for head in range(heads):
            losses = [
                np.mean(
                    [
                        _moved(model, *triple, layer, head, ratio)
                        for triple in zip(readings, bases, lessons, strict=True)
                    ]
                )
                for ratio in ratios
            ]
            rows.append([float(loss - start) for loss in losses])
            progress(layer * heads + head + 1, layers * heads)
        curves.append(rows)
        with atomic_path(part) as temporary:
            temporary.write_text(json.dumps({"ratios": list(ratios), "texts": texts, "curves": curves}))
    shares = solve_shares(ratios, np.array(curves).reshape(layers * heads, -1)).reshape(layers, heads)
    with atomic_path(path_of(model)) as temporary:
        facts = {"ratios": list(ratios), "baseline": BASELINE, "curves": curves, "shares": shares.tolist()}
        temporary.write_text(json.dumps(facts))
    part.unlink()
    return shares


def _partial(path: Path, ratios: Sequence[float], texts: str) -> list[list[list[float]]]:
    try:
        facts = json.loads(path.read_text())
        return facts["curves"] if (facts["ratios"], facts["texts"]) == (list(ratios), texts) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _moved(
    model: PreTrainedModel, reading: Reading, base: CompactCache, lesson: Lesson, layer: int, head: int, ratio: float
) -> float:
    """NLL of the answers where one head keeps `ratio` and every other one is as in `base`."""
    method = AttentionMatching(ratio=BASELINE, budgets="uniform")
    index, original = reading.cache.compact_layers()[layer]
    assert original.store is not None
    tokens = int(original.store.lengths.max())
    counts = [method.budget(tokens)] * original.store.heads
    counts[head] = max(method.sinks + 1, round(ratio * tokens))
    changed = copy.copy(original)
    compact_layer(changed, method, reading.recorder, [counts])
    cache = CompactCache(model)
    cache.layers = [*base.layers[:index], changed, *base.layers[index + 1 :]]
    return _nll(model, cache, lesson)


def _nll(model: PreTrainedModel, cache: CompactCache, lesson: Lesson) -> float:
    """Mean NLL in nats of the reference answers, all questions in one batch behind a copy of `cache`."""
    longest = max(ids.shape[1] for ids in lesson.answered)
    ids = torch.cat([torch.nn.functional.pad(ids, (0, longest - ids.shape[1])) for ids in lesson.answered])
    logits = model(ids, past_key_values=cache.copy()).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    column = torch.arange(1, longest)
    scored = [
        (column >= start) & (column < ids.shape[1]) for start, ids in zip(lesson.starts, lesson.answered, strict=True)
    ]
    return float(losses[torch.stack(scored)].mean())
