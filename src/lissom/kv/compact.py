"""`compact`: one document in, a small cache out that answers many questions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.kv.attention_matching import AttentionMatching
from lissom.kv.cache import CompactCache, CompactLayer, compact_layers, replace_blocks
from lissom.kv.compactor import Compactor, Problem, Wanted
from lissom.kv.harvest import Evidence, QueryRecorder, QuerySource, forward, repeat_ids, rolled_back, self_study_ids
from lissom.kv.head_budgets import apportion, global_counts
from lissom.kv.storage import Block, RaggedStore
from lissom.models import describe_decoder

Progress = Callable[[str, int, int], None]


@torch.no_grad()
def compact(
    model: PreTrainedModel,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
    method: Compactor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    self_study_tokens: int = 64,
    progress: Progress | None = None,
    **settings: Any,
) -> CompactCache:
    """Read a document once and keep a small cache of it.

    Args:
        model: any decoder of transformers with `sdpa` or `eager` attention. Its attention is exchanged for one that
            reads compacted caches and does the same as before for all others
            (`lissom.models.attention.uninstall` undoes it).
        inputs: token ids `[rows, tokens]`, or a tokenizer's output with `input_ids` and `attention_mask`.
        method: how to compact; default `AttentionMatching(**settings)`.
        tokenizer: lets the repeat pass ask for the repetition in the chat format; needed by self-study.
        self_study_tokens: tokens that self-study generates per prompt.
        progress: called with (stage, done, total).
        settings: of `AttentionMatching`, where no `method` is given.

    Returns:
        A cache for `model.generate(..., past_key_values=cache.copy())`, where `input_ids` holds the document's tokens
        followed by the question's.

    Raises:
        UserError: the document is empty or longer than the model's context, or the model's attention is unsupported.
    """
    if method is not None and settings:
        raise TypeError("Pass either a method or its settings, not both.")
    method = method or AttentionMatching(**settings)
    cache, recorder = _read(model, inputs, method, tokenizer, self_study_tokens, progress or _silent)
    if not method.on_policy:
        fit(cache, method, recorder, progress or _silent)
    return cache


@torch.no_grad()
def read(model: PreTrainedModel, inputs: torch.Tensor | Mapping[str, torch.Tensor]) -> CompactCache:
    """The full cache of a document; arguments and errors as of `compact`."""
    ids, visible = _document(model, inputs)
    cache = CompactCache(model)
    forward(model, ids, visible, cache)
    for _, layer in cache.compact_layers():
        layer.seal(visible)
    return cache


@torch.no_grad()
def recompact(
    model: PreTrainedModel,
    cache: CompactCache,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
    method: Compactor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    self_study_tokens: int = 64,
    progress: Progress | None = None,
) -> CompactCache:
    """Compact a cache further, one that was compacted before or not; `cache` stays as it is.

    The biases of the earlier compaction are part of the attention that is matched.

    Args:
        inputs: what the cache has read, as for `compact`: the passes that record queries are made of it.
        method: its ratio counts what the cache holds now.

    Raises:
        UserError: the cache is another model's, `inputs` have not the shape of what it has read, or the method wants
            the queries of the first reading.
    """
    method = method or AttentionMatching()
    ids, visible = _document(model, inputs)
    if cache.owner() is not model:
        raise UserError("The cache was made with another model.")
    if ids.shape[1] != cache.get_seq_length() or ids.shape[0] != cache.rows:
        raise UserError(
            f"The cache has read {cache.get_seq_length()} tokens in {cache.rows} rows, "
            f"the inputs have {ids.shape[1]} in {ids.shape[0]}."
        )
    if method.queries == "context":
        raise UserError("The queries of the first reading are gone; use queries='repeat' or a method that needs none.")
    smaller, recorder = cache.copy(), recorder_for(model, method)
    report = progress or _silent
    study(model, smaller, ids, visible, method, recorder, tokenizer, self_study_tokens, report)
    if not method.on_policy:
        fit(smaller, method, recorder, report)
    return smaller


@dataclass(frozen=True)
class Reading:
    """A document that was read, and the reference queries of each of its layers: it can be compacted in several ways.

    Attributes:
        cache: the full cache.
        recorder: the queries.
        recorded: which queries they are.
    """

    model: PreTrainedModel
    cache: CompactCache
    recorder: QueryRecorder
    recorded: Wanted

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        model: PreTrainedModel,
        inputs: torch.Tensor | Mapping[str, torch.Tensor],
        method: Compactor,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        self_study_tokens: int = 64,
        progress: Progress | None = None,
    ) -> Reading:
        """Read a document and record the queries that `method` asks for; arguments as of `compact`."""
        if method.on_policy:
            raise UserError("On-policy queries depend on the compaction, so a reading cannot be shared; call compact.")
        cache, recorder = _read(model, inputs, method, tokenizer, self_study_tokens, progress or _silent)
        return cls(model, cache, recorder, method.evidence)

    @torch.no_grad()
    def compact(self, method: Compactor, progress: Progress | None = None) -> CompactCache:
        """A small cache by `method`, on the queries that were recorded; the reading stays as it is.

        Raises:
            UserError: the method wants other queries than those.
        """
        wanted, recorded = method.evidence, self.recorded
        same = wanted[:3] == recorded[:3] and recorded.own_mass >= wanted.own_mass
        if method.queries != "none" and not same:
            raise UserError(f"{method} wants {wanted}, the document was read for {recorded}: read it for this method.")
        cache = CompactCache(self.model)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        fit(cache, method, self.recorder, progress)
        return cache


def _silent(stage: str, done: int, total: int) -> None:
    pass


def _read(
    model: PreTrainedModel,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
    method: Compactor,
    tokenizer: PreTrainedTokenizerBase | None,
    self_study_tokens: int,
    report: Progress,
) -> tuple[CompactCache, QueryRecorder]:
    """The full cache and its queries; on-policy methods have compacted it when this returns."""
    ids, visible = _document(model, inputs)
    cache = CompactCache(model)
    recorder = recorder_for(model, method)
    report("read", 0, 1)
    if method.queries == "context":
        recorder.expect(0, visible)
        with recorder.recording(cache):
            forward(model, ids, visible, cache)
    else:
        forward(model, ids, visible, cache)
    report("read", 1, 1)
    study(model, cache, ids, visible, method, recorder, tokenizer, self_study_tokens, report)
    return cache, recorder


def study(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    visible: torch.Tensor,
    method: Compactor,
    recorder: QueryRecorder,
    tokenizer: PreTrainedTokenizerBase | None = None,
    self_study_tokens: int = 64,
    report: Progress = _silent,
) -> None:
    """Seal a cache that has read `ids` with padding mask `visible`, both `[rows, tokens]`, and record the queries of
    the passes that the method asks for. On-policy methods compact each layer in the last of them."""
    for _, layer in compact_layers(cache):
        layer.seal(visible)
    passes = _study(model, cache, ids, visible, method, tokenizer, self_study_tokens)
    for number, (tokens, shown) in enumerate(passes):
        report("queries", number, len(passes))
        recorder.expect(ids.shape[1], shown)
        with rolled_back(cache), recorder.recording(cache):
            if method.on_policy and number == len(passes) - 1:
                _compact_on_the_way(cache, method, recorder)
            forward(model, tokens, torch.cat([visible, shown], 1), cache)
        report("queries", number + 1, len(passes))
    for _, layer in compact_layers(cache):
        if layer.store is not None:
            layer.store.reserve(0)  # the study's tokens are forgotten, their space is given back


def fit(cache: Cache, method: Compactor, source: QuerySource, report: Progress | None = None) -> None:
    """Compact every layer of a sealed cache on the queries of `source`."""
    layers = [layer for _, layer in compact_layers(cache)]
    plan = allocate(method, layers, source)
    for number, layer in enumerate(layers):
        compact_layer(layer, method, source, *(plan[number] if plan else ()))
        if report is not None:
            report("fit", number + 1, len(layers))


def compact_layer(
    layer: CompactLayer,
    method: Compactor,
    source: QuerySource,
    counts: Sequence[Sequence[int]] | None = None,
    known: Sequence[Any] | None = None,
) -> None:
    """Replace what `layer` holds before its tail by what `method` makes of it.

    Args:
        counts: entries to keep, `[rows][KV heads]`; None = the method's ratio of what each head holds now.
        known: of each row, what the method's scores gave for `fit`.
    """
    store, tail = layer.store, layer.tail
    assert store is not None
    blocks: list[Block] = []
    for row in range(store.rows):
        problem, stored = problem_of(layer, row, method, source)
        wanted = counts[row] if counts else [method.budget(len(block.keys)) for block in stored]
        budget = [min(count, len(block.keys)) for count, block in zip(wanted, stored, strict=True)]
        fitted = method.fit(problem, budget, known[row] if known else None)
        for head, block in enumerate(fitted):
            original = store.block(row * store.heads + head)
            blocks.append(_joined(block, _part(original, len(original.keys) - tail, len(original.keys))))
    replace_blocks(layer, blocks, tail)


def problem_of(layer: CompactLayer, row: int, method: Compactor, source: QuerySource) -> tuple[Problem, list[Block]]:
    """What a compaction of one row has to solve, and the entries that it is about: all before the tail."""
    store = layer.store
    assert store is not None
    originals = [store.block(row * store.heads + head) for head in range(store.heads)]
    stored = [_part(block, 0, len(block.keys) - layer.tail) for block in originals]
    # Of a method that draws, every layer and row draws anew.
    seed = method.seed + row + 7919 * layer.index
    return _problem(stored, source.of(layer, row, store.heads), method, seed), stored


def allocate(
    method: Compactor, layers: Sequence[CompactLayer], source: QuerySource
) -> list[tuple[list[list[int]], list[Any]]] | None:
    """Of each layer the entries `[rows][KV heads]` under the method's `budgets`, and what its scores gave for `fit`;
    None where every head gets the same."""
    if method.sharing == "uniform":
        return None
    rows = [_allocate_row(method, layers, source, row) for row in range(_store(layers[0]).rows)]
    return [
        ([counts[index].tolist() for counts, _ in rows], [known[index] for _, known in rows])
        for index in range(len(layers))
    ]


def _allocate_row(
    method: Compactor, layers: Sequence[CompactLayer], source: QuerySource, row: int
) -> tuple[torch.Tensor, Sequence[Any]]:
    """Entries `[layers, KV heads]` of one row, and of each layer what the scores gave."""
    heads = _store(layers[0]).heads
    lengths = [_store(layer).lengths[row * heads : (row + 1) * heads] - layer.tail for layer in layers]
    tokens = round(float(torch.stack(lengths).double().mean()))  # of a cache that was compacted before, on average
    least = min(tokens, method.sinks + method.recent + 1)
    total = method.budget(tokens) * heads * len(layers)
    known: Sequence[Any] = [None] * len(layers)
    if method.sharing == "global":
        scored = [method.scores(problem_of(layer, row, method, source)[0]) for layer in layers]
        scores, known = zip(*scored, strict=True)
        longest = max(part.shape[1] for part in scores)
        padded = [F.pad(part, (0, longest - part.shape[1]), value=-torch.inf) for part in scores]
        counts = global_counts(torch.cat(padded), total, least)
    else:
        shares = torch.as_tensor(method.shares, dtype=torch.float64).flatten()
        if len(shares) != heads * len(layers):
            raise UserError(
                f"The head budgets are for {len(shares)} KV heads, the model has {heads * len(layers)} that are "
                "compacted: measure its own with `lissom budgets`."
            )
        most = max(least, int(0.75 * tokens), -(-total // len(shares)))
        counts = apportion(shares, total, least, most)
    return counts.view(len(layers), heads), known


def _store(layer: CompactLayer) -> RaggedStore:
    assert layer.store is not None
    return layer.store


def _document(
    model: PreTrainedModel, inputs: torch.Tensor | Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(inputs, str):
        raise UserError("Pass token ids: lissom.kv.document.document_ids(tokenizer, text) makes them of a text.")
    if isinstance(inputs, torch.Tensor):
        ids, mask = inputs, None
    else:
        if not isinstance(inputs, Mapping) or inputs.get("input_ids") is None:
            raise UserError("Expected token ids as a tensor, or a tokenizer's output with input_ids.")
        ids = torch.as_tensor(inputs["input_ids"])
        mask = None if inputs.get("attention_mask") is None else torch.as_tensor(inputs["attention_mask"])
    ids = ids[None] if ids.ndim == 1 else ids
    mask = mask[None] if mask is not None and mask.ndim == 1 else mask
    if ids.ndim != 2 or ids.numel() == 0:
        raise UserError("The document is empty: there is nothing to compact.")
    if mask is not None and mask.shape != ids.shape:
        raise UserError(f"The attention mask {tuple(mask.shape)} is not of the shape of the ids {tuple(ids.shape)}.")
    vocabulary = describe_decoder(model).vocab_size
    if ids.is_floating_point() or ids.dtype == torch.bool or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise UserError(f"The ids are no tokens of this model, which has {vocabulary}.")
    ids = ids.to(model.device)
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().to(ids.device)
    if not bool(visible.any(-1).all()):
        raise UserError("A row of the batch holds only padding: there is nothing to compact.")
    limit = describe_decoder(model).max_position_embeddings
    if ids.shape[1] > limit:
        raise UserError(f"The document has {ids.shape[1]} tokens, the model reads at most {limit}. Shorten it.")
    return ids, visible


def recorder_for(model: PreTrainedModel, method: Compactor) -> QueryRecorder:
    """An empty recorder of what `method` wants: `max_queries` queries for a KV head come from its whole group."""
    info = describe_decoder(model)
    tokens = max(1, method.max_queries * info.num_key_value_heads // info.num_attention_heads)
    return QueryRecorder(tokens, method.seed, method.wants_own_mass)


def _study(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    visible: torch.Tensor,
    method: Compactor,
    tokenizer: PreTrainedTokenizerBase | None,
    self_study_tokens: int,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and padding masks of the passes that produce queries, in order."""
    passes = []
    if method.queries in ("self-study", "repeat+self-study"):
        for talk in self_study_ids(model, cache, visible, tokenizer, self_study_tokens, method.seed):
            passes.append((talk, torch.ones_like(talk, dtype=torch.bool)))
    if method.queries in ("repeat", "repeat+self-study"):
        passes.append(repeat_ids(ids, visible, tokenizer, describe_decoder(model).max_position_embeddings))
    return passes


def _compact_on_the_way(cache: Cache, method: Compactor, recorder: QueryRecorder) -> None:
    """During the next forward pass, compact each layer when its queries arrive, before its attention is computed.

    Layer l then sees queries that have passed the compacted layers below it: on-policy fitting in one pass.
    """

    def observe(layer: CompactLayer, query: torch.Tensor, scaling: float, first: int) -> None:
        recorder.observe(layer, query, scaling, first)
        compact_layer(layer, method, recorder)

    for _, layer in compact_layers(cache):
        layer.observer, layer.in_order = observe, True


def _problem(
    stored: Sequence[Block],
    evidence: Evidence | None,
    method: Compactor,
    seed: int,
) -> Problem:
    longest = max(len(block.keys) for block in stored)
    device, size = stored[0].keys.device, stored[0].keys.shape[-1]
    keys = torch.zeros(len(stored), longest, size, dtype=torch.float32, device=device)
    values = torch.zeros_like(keys)
    bias = torch.full((len(stored), longest), -torch.inf, dtype=torch.float32, device=device)
    positions = torch.zeros(len(stored), longest, dtype=torch.int64, device=device)
    for head, block in enumerate(stored):
        count = len(block.keys)
        keys[head, :count], values[head, :count] = block.keys.float(), block.values.float()
        positions[head, :count] = block.positions.long()
        bias[head, :count] = 0.0 if block.bias is None else block.bias
    exists = bias > -torch.inf
    first = positions.masked_fill(~exists, torch.iinfo(torch.int64).max).amin()
    last = positions.masked_fill(~exists, -1).amax()
    protected = exists & ((positions < first + method.sinks) | (positions > last - method.recent))
    if evidence is None:
        if method.queries != "none":
            raise UserError(f"No reference queries were recorded for {method}.")
        evidence = Evidence(keys[:, :1], positions.new_full((1,), int(last)), 1.0)
    return Problem(
        keys,
        values,
        bias,
        positions,
        protected,
        evidence.queries,
        evidence.positions,
        evidence.scaling,
        seed,
        evidence.own_mass,
    )


def _part(block: Block, start: int, end: int) -> Block:
    bias = None if block.bias is None else block.bias[start:end]
    return Block(block.keys[start:end], block.values[start:end], block.positions[start:end], bias)


def _joined(fitted: Block, tail: Block) -> Block:
    """Fitted entries in the cache's dtype, then the tail. Biases that are all zero are not stored."""
    dtype = tail.keys.dtype
    bias = fitted.bias if fitted.bias is not None and bool(fitted.bias.any()) else None
    if bias is not None:
        bias = torch.cat([bias.float(), bias.new_zeros(len(tail.keys)) if tail.bias is None else tail.bias])
    return Block(
        torch.cat([fitted.keys.to(dtype), tail.keys]),
        torch.cat([fitted.values.to(dtype), tail.values]),
        torch.cat([fitted.positions.to(torch.int32), tail.positions]),
        bias,
    )
