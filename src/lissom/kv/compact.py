"""`compact`: one document in, a small cache out that answers many questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.kv.attention_matching import AttentionMatching
from lissom.kv.cache import CompactCache, CompactLayer, compact_layers, replace_blocks
from lissom.kv.compactor import Compactor, Problem
from lissom.kv.harvest import Evidence, QueryRecorder, QuerySource, forward, repeat_ids, rolled_back, self_study_ids
from lissom.kv.storage import Block
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
    ids, visible = _document(model, inputs)
    cache = CompactCache(model)
    recorder = QueryRecorder(token_limit(model, method), method.seed)
    report: Progress = progress or (lambda stage, done, total: None)
    report("read", 0, 1)
    if method.queries == "context":
        recorder.expect(0, visible)
        with recorder.recording(cache):
            forward(model, ids, visible, cache)
    else:
        forward(model, ids, visible, cache)
    report("read", 1, 1)
    compact_read(model, cache, ids, visible, method, recorder, tokenizer, self_study_tokens, report)
    return cache


def compact_read(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    visible: torch.Tensor,
    method: Compactor,
    recorder: QueryRecorder,
    tokenizer: PreTrainedTokenizerBase | None = None,
    self_study_tokens: int = 64,
    report: Progress = lambda stage, done, total: None,
) -> None:
    """Compact `cache`, which has read `ids` with padding mask `visible`, both `[rows, tokens]`.

    The queries are those that `recorder` holds, or come from the passes that the method asks for.
    """
    for _, layer in compact_layers(cache):
        layer.seal(visible)
    on_policy = getattr(method, "on_policy", False)
    passes = _study(model, cache, ids, visible, method, tokenizer, self_study_tokens)
    for number, (tokens, shown) in enumerate(passes):
        report("queries", number, len(passes))
        recorder.expect(ids.shape[1], shown)
        with rolled_back(cache), recorder.recording(cache):
            if on_policy and number == len(passes) - 1:
                _compact_on_the_way(cache, method, recorder)
            forward(model, tokens, torch.cat([visible, shown], 1), cache)
        report("queries", number + 1, len(passes))
    if on_policy and passes:
        for _, layer in compact_layers(cache):
            if layer.store is not None:
                layer.store.reserve(0)  # the study's tokens are forgotten, their space is given back
        return
    layers = compact_layers(cache)
    for number, (_, layer) in enumerate(layers):
        compact_layer(layer, method, recorder)
        report("fit", number + 1, len(layers))


def compact_layer(layer: CompactLayer, method: Compactor, source: QuerySource, count: int | None = None) -> None:
    """Replace what `layer` holds before its tail by what `method` makes of it.

    Args:
        count: entries to keep per KV head; None = the method's ratio of what is held now.
    """
    store, tail = layer.store, layer.tail
    assert store is not None
    blocks: list[Block] = []
    for row in range(store.rows):
        originals = [store.block(row * store.heads + head) for head in range(store.heads)]
        stored = [_part(block, 0, len(block.keys) - tail) for block in originals]
        problem = _problem(stored, source.of(layer, row, store.heads), method, row)
        real = int(problem.exists.sum(-1).max())
        wanted = method.budget(real) if count is None else count
        fitted = method.fit(problem, [min(wanted, len(block.keys)) for block in stored])
        for fit, original in zip(fitted, originals, strict=True):
            blocks.append(_joined(fit, _part(original, len(original.keys) - tail, len(original.keys))))
    replace_blocks(layer, blocks, tail)


def _document(
    model: PreTrainedModel, inputs: torch.Tensor | Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(inputs, torch.Tensor):
        ids, mask = inputs, None
    else:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.numel() == 0:
        raise UserError("The document is empty: there is nothing to compact.")
    ids = ids.to(model.device)
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool().to(ids.device)
    if not bool(visible.any(-1).all()):
        raise UserError("A row of the batch holds only padding: there is nothing to compact.")
    limit = describe_decoder(model).max_position_embeddings
    if ids.shape[1] > limit:
        raise UserError(f"The document has {ids.shape[1]} tokens, the model reads at most {limit}. Shorten it.")
    return ids, visible


def token_limit(model: PreTrainedModel, method: Compactor) -> int:
    """Tokens to record so that a KV head gets `max_queries` queries from its whole group."""
    info = describe_decoder(model)
    return max(1, method.max_queries * info.num_key_value_heads // info.num_attention_heads)


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
        tokens, shown = repeat_ids(ids, visible, tokenizer)
        room = describe_decoder(model).max_position_embeddings - ids.shape[1]
        if room < 1:
            raise UserError("The document fills the model's context; use queries='context'.")
        passes.append((tokens[:, :room], shown[:, :room]))
    return passes


def _compact_on_the_way(cache: Cache, method: Compactor, recorder: QueryRecorder) -> None:
    """During the next forward pass, compact each layer when its queries arrive, before its attention is computed.

    Layer l then sees queries that have passed the compacted layers below it: on-policy fitting in one pass.
    """

    def observe(layer: CompactLayer, query: torch.Tensor, scaling: float) -> None:
        recorder.observe(layer, query, scaling)
        compact_layer(layer, method, recorder)

    for _, layer in compact_layers(cache):
        layer.observer = observe


def _problem(
    stored: Sequence[Block],
    evidence: Evidence | None,
    method: Compactor,
    row: int,
) -> Problem:
    longest = max(len(block.keys) for block in stored)
    device, size = stored[0].keys.device, stored[0].keys.shape[-1]
    keys = torch.zeros(len(stored), longest, size, device=device)
    values = torch.zeros_like(keys)
    bias = torch.full((len(stored), longest), -torch.inf, device=device)
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
    if evidence is None:  # the method asks for no queries
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
        method.seed + row,
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
