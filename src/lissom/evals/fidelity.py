"""Many questions, one document: how near a compacted cache comes to the full one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.texts import Question
from lissom.kv.cache import CompactCache
from lissom.kv.document import question_ids
from lissom.kv.storage import RaggedStore

_RECALL_TOKENS = 14  # enough for "The access code of the archive is 12345."


@dataclass(frozen=True)
class Probe:
    """One layer during the full cache's answer: `query` `[1, query heads, tokens, head_dim]`, the new tokens' `keys`
    and `values` `[1, KV heads, tokens, head_dim]`, and the attention `output` and `log_mass` over everything."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scaling: float
    output: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    log_mass: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True)
class Teacher:
    """The full cache's answer to one question.

    Attributes:
        question: the question.
        ids: `[1, question + answer]`.
        start: tokens of the question.
        log_probs: `[answer, vocab]`.
        probes: one per ragged layer; none where the full cache is a plain one of transformers.
        answer: decoded.
    """

    question: Question
    ids: torch.Tensor
    start: int
    log_probs: torch.Tensor
    probes: list[Probe]
    answer: str


@dataclass(frozen=True)
class Score:
    """One question: means over the answer's tokens. `recalled` is None for open questions, the attention errors are
    None without probes."""

    kl: float
    nll: float
    top1: float
    output_error: float | None
    mass_error: float | None
    recalled: bool | None


@torch.no_grad()
def teach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: torch.Tensor,
    full: Cache,
    questions: Sequence[Question],
    max_new_tokens: int = 32,
) -> list[Teacher]:
    """Greedy answers of the full cache. `document` `[1, tokens]` are the ids that `full` has read."""
    asked = [question_ids(tokenizer, question.text).to(document.device) for question in questions]
    teachers = []
    answered = answer_ids(model, document, asked, full, max_new_tokens)
    for question, start, ids in zip(questions, (ids.shape[1] for ids in asked), answered, strict=True):
        logits, probes = _probe(model, ids, full)
        log_probs = logits[0, start - 1 : -1].float().log_softmax(-1)
        text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        teachers.append(Teacher(question, ids, start, log_probs, probes, text))
    return teachers


@torch.no_grad()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: torch.Tensor,
    cache: Cache,
    teachers: Sequence[Teacher],
) -> list[Score]:
    """Teacher-forced distances to the full cache, and whether `cache`'s own greedy answers hold the planted strings.

    The own answers are one batch behind rows of `cache`. Where rows share a budget in bytes, ask one by one.
    """
    planted = [teacher for teacher in teachers if teacher.question.answer is not None]
    asked = [teacher.ids[:, : teacher.start] for teacher in planted]
    own = answer_ids(model, document, asked, cache, _RECALL_TOKENS) if planted else []
    found = {id(t): recalled(tokenizer, t, ids) for t, ids in zip(planted, own, strict=True)}
    return [_score(model, cache, teacher, found.get(id(teacher))) for teacher in teachers]


def recalled(tokenizer: PreTrainedTokenizerBase, teacher: Teacher, ids: torch.Tensor) -> bool:
    """Whether the start of the answer in `ids` `[1, question + answer]` holds the string that the question asks for."""
    text = tokenizer.decode(ids[0, teacher.start : teacher.start + _RECALL_TOKENS], skip_special_tokens=True)
    return str(teacher.question.answer).lower() in text.lower()


def _score(model: PreTrainedModel, cache: Cache, teacher: Teacher, recalled: bool | None) -> Score:
    logits = model(teacher.ids, past_key_values=copy.deepcopy(cache)).logits
    own = logits[0, teacher.start - 1 : -1].float().log_softmax(-1)
    wanted = teacher.log_probs
    answer = teacher.ids[0, teacher.start :]
    output_error = mass_error = None
    if teacher.probes and isinstance(cache, CompactCache):
        output_error, mass_error = attention_errors(cache, teacher.probes)
    return Score(
        kl=float((wanted.exp() * (wanted - own)).sum(-1).mean()),
        nll=float(-own.gather(1, answer[:, None]).mean()),
        top1=float((wanted.argmax(-1) == own.argmax(-1)).float().mean()),
        output_error=output_error,
        mass_error=mass_error,
        recalled=recalled,
    )


def answer_ids(
    model: PreTrainedModel, document: torch.Tensor, asked: Sequence[torch.Tensor], cache: Cache, new_tokens: int
) -> list[torch.Tensor]:
    """Greedy answers, each `[1, question + answer]`, as one batch behind rows of `cache`, which stays as it is.

    Args:
        document: `[1, tokens]`, what `cache` has read.
        asked: the questions, each `[1, tokens]`.
    """
    longest, rows = max(ids.shape[1] for ids in asked), len(asked)
    padding = [longest - ids.shape[1] for ids in asked]
    ids = torch.cat([F.pad(ids, (missing, 0)) for ids, missing in zip(asked, padding, strict=True)])
    ids = torch.cat([document.expand(rows, -1), ids], 1)
    mask = torch.ones_like(ids)
    for row, missing in enumerate(padding):
        mask[row, document.shape[1] : document.shape[1] + missing] = 0
    behind = copy.deepcopy(cache)
    if rows > 1:
        behind.batch_repeat_interleave(rows)
    output = model.generate(
        ids, attention_mask=mask, past_key_values=behind, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    ends = torch.tensor(model.generation_config.eos_token_id or [], dtype=ids.dtype, device=ids.device).reshape(-1)
    whole = []
    for row, missing in zip(output[:, document.shape[1] :], padding, strict=True):
        ended = torch.isin(row[longest:], ends).nonzero().flatten()
        stop = longest + int(ended[0]) + 1 if len(ended) else len(row)
        whole.append(row[None, missing:stop])
    return whole


def attention_errors(cache: CompactCache, probes: Sequence[Probe]) -> tuple[float, float]:
    """Mean over layers of the relative error of the attention output and of |Δ log mass|.

    Every layer is asked the queries of the full cache's own run, followed by that run's new keys and values, so the
    errors are those of the compaction, layer by layer, without the drift of the layers below.
    """
    errors, masses = [], []
    for (_, layer), probe in zip(cache.compact_layers(), probes, strict=True):
        assert layer.store is not None
        output, log_mass = _attend(layer.store, probe)
        errors.append(float((output - probe.output).norm() / probe.output.norm()))
        masses.append(float((log_mass - probe.log_mass).abs().mean()))
    return sum(errors) / len(errors), sum(masses) / len(masses)


def _attend(store: RaggedStore, probe: Probe) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values, bias = store.padded()
    keys, values = torch.cat([keys, probe.keys], 2).float(), torch.cat([values, probe.values], 2).float()
    groups, queries, length = probe.query.shape[1] // keys.shape[1], probe.query.shape[2], keys.shape[2]
    logits = probe.query.float() @ keys.repeat_interleave(groups, 1).mT * probe.scaling
    if bias is not None:
        logits[..., : bias.shape[-1]] += bias.repeat_interleave(groups, 1)[:, :, None]
    later = torch.ones(queries, length, dtype=torch.bool, device=keys.device).triu(length - queries + 1)
    logits = logits.masked_fill(later, -torch.inf)
    return torch.softmax(logits, -1) @ values.repeat_interleave(groups, 1), logits.logsumexp(-1)


def _probe(model: PreTrainedModel, ids: torch.Tensor, full: Cache) -> tuple[torch.Tensor, list[Probe]]:
    """Logits of `ids` behind the full cache, and each ragged layer's queries, new entries and attention."""
    cache, queries = copy.deepcopy(full), []
    probes: list[Probe] = []
    if not (isinstance(full, CompactCache) and isinstance(cache, CompactCache)):
        return model(ids, past_key_values=cache).logits, probes
    for _, layer in cache.compact_layers():
        layer.observer = lambda layer, query, scaling, first: queries.append((query, scaling))
    logits = model(ids, past_key_values=cache).logits
    layers = zip(cache.compact_layers(), full.compact_layers(), queries, strict=True)
    for (_, after), (_, before), (query, scaling) in layers:
        assert after.store is not None and before.store is not None
        keys, values, _ = after.store.padded()
        new = ids.shape[1]
        probe = Probe(query, keys[:, :, -new:], values[:, :, -new:], scaling)
        output, log_mass = _attend(before.store, probe)
        probes.append(replace(probe, output=output, log_mass=log_mass))
    return logits, probes
