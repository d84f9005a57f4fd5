"""Reference queries: recording them, and the passes over the model that produce them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.kernels.attention_statistics import attention_statistics
from lissom.kv.cache import CompactLayer, compact_layers
from lissom.kv.document import question_ids

logger = logging.getLogger(__name__)

REPEAT_PROMPT = "Repeat the text above word for word."
SELF_STUDY_PROMPTS = (
    "Summarize the main points of the text above.",
    "List the facts, names and numbers that the text above states.",
    "Write the information of the text above as JSON.",
    "Write three questions about the text above and answer them.",
)

_LAST = 64  # tokens at the end of a pass that are always recorded: SnapKV's window


@dataclass(frozen=True)
class Evidence:
    """Reference queries of one layer and row: `queries` `[KV heads, group · tokens, head_dim]` fp32, rotated, and
    `positions` `[group · tokens]`; `scaling` is the factor on the layer's logits; `own_mass` `[KV heads, group ·
    tokens]`, where it was asked for, is the log mass that each query finds in its own pass, the document apart."""

    queries: torch.Tensor
    positions: torch.Tensor
    scaling: float
    own_mass: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        queries: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        heads: int,
        scaling: float,
        own_mass: torch.Tensor | None = None,
    ) -> Evidence:
        """Of `queries` `[query heads, tokens, head_dim]`, `positions` and `visible` `[tokens]`, `own_mass` `[query
        heads, tokens]`; padding is dropped."""
        kept, places = queries[:, visible.to(queries.device)].float(), positions[visible]
        group = len(kept) // heads
        if own_mass is not None:
            own_mass = own_mass[:, visible.to(own_mass.device)].reshape(heads, -1)
        return cls(kept.reshape(heads, -1, kept.shape[-1]), places.repeat(group).to(kept.device), scaling, own_mass)


class QuerySource(Protocol):
    """Where the reference queries of a layer come from."""

    def of(self, layer: CompactLayer, row: int, heads: int) -> Evidence | None:
        """Those of one row, None where nothing was recorded."""
        ...


class QueryRecorder:
    """Collects a layer's rotated queries, a random sample of at most `limit` tokens per row (and the last ones).

    Attributes:
        own_mass: also keep the log mass of the pass's own tokens (see `Evidence`).
        queries: per index of a layer `[rows, query heads, tokens, head_dim]`.
        positions: `[tokens]`, logical positions of the tokens.
        visible: bool `[rows, tokens]`, false for padding.
        scaling: per index of a layer, the factor on its logits.
    """

    def __init__(self, limit: int, seed: int, own_mass: bool = False) -> None:
        self.limit, self.own_mass = limit, own_mass
        self.generator = torch.Generator().manual_seed(seed)
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.scaling: dict[int, float] = {}
        self._positions: list[torch.Tensor] = []
        self._visible: list[torch.Tensor] = []
        self._masses: dict[int, list[torch.Tensor]] = {}
        self._pick: torch.Tensor | None = None
        self._shown = torch.empty(0, 0, dtype=torch.bool)

    @contextmanager
    def recording(self, cache: Cache) -> Iterator[None]:
        """Record every forward pass inside the block."""
        layers = [layer for _, layer in compact_layers(cache)]
        before = [layer.observer for layer in layers]
        for layer in layers:
            layer.observer = self.observe
        try:
            yield
        finally:
            for layer, observer in zip(layers, before, strict=True):
                layer.observer = observer

    def expect(self, first_position: int, visible: torch.Tensor) -> None:
        """Announce a forward pass over tokens from `first_position` with padding mask `visible` `[rows, tokens]`."""
        tokens = visible.shape[1]
        # All heads of a group are stacked, so a limit in queries is met by fewer tokens; the caller divides.
        # The last tokens are TOVA's and SnapKV's whole evidence, and the best guess of what comes next.
        last = max(0, tokens - min(_LAST, max(1, self.limit // 8)))
        others = torch.randperm(last, generator=self.generator)[: max(0, self.limit - (tokens - last))].sort().values
        picked = torch.cat([others, torch.arange(last, tokens)])
        self._pick, self._shown = picked, visible
        self._positions.append(first_position + picked)
        self._visible.append(visible[:, picked].bool().cpu())

    def observe(self, layer: CompactLayer, query: torch.Tensor, scaling: float) -> None:
        """Keep the announced tokens' queries; the observer of a `CompactLayer`."""
        assert self._pick is not None, "expect() comes before the forward pass"
        self.queries.setdefault(layer.index, []).append(query[:, :, self._pick.to(query.device)].detach())
        self.scaling[layer.index] = scaling
        if self.own_mass:
            self._masses.setdefault(layer.index, []).append(_own_mass(layer, query, scaling, self._pick, self._shown))

    def of(self, layer: CompactLayer, row: int, heads: int) -> Evidence | None:
        """See `QuerySource`."""
        if layer.index not in self.queries:
            return None
        recorded = torch.cat(self.queries[layer.index], dim=2)[row]
        visible = torch.cat(self._visible, dim=1)[row]
        mass = torch.cat(self._masses[layer.index], dim=2)[row] if self.own_mass else None
        return Evidence.of(recorded, torch.cat(self._positions), visible, heads, self.scaling[layer.index], mass)


def _own_mass(
    layer: CompactLayer, query: torch.Tensor, scaling: float, picked: torch.Tensor, shown: torch.Tensor
) -> torch.Tensor:
    """Log mass `[rows, query heads, picked]` of the layer's tail up to each picked query, without padding."""
    store = layer.store
    assert store is not None
    keys = torch.stack([block.keys[len(block.keys) - layer.tail :] for block in store.blocks()]).float()
    queries = query[:, :, picked.to(query.device)].float()
    bias = torch.zeros(shown.shape, device=keys.device).masked_fill_(~shown.to(keys.device), -torch.inf)
    found = attention_statistics(
        queries.reshape(len(keys), -1, queries.shape[-1]),
        keys,
        None,
        bias.repeat_interleave(store.heads, 0),
        scaling,
        positions=torch.arange(layer.tail, device=keys.device).expand(len(keys), -1),
        query_positions=picked.to(keys.device).repeat(query.shape[1] // store.heads),
    )
    return (found.top + found.mass.log()).view(queries.shape[:-1])


def forward(model: PreTrainedModel, ids: torch.Tensor, visible: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read `ids` `[rows, tokens]` behind `cache`; logits of the last token `[rows, vocab]`.

    Args:
        visible: bool `[rows, tokens so far]`, the padding mask of everything read, `ids` included.
    """
    positions = (visible.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    mask = None if bool(visible.all()) else visible.long()
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]


@contextmanager
def rolled_back(cache: Cache) -> Iterator[None]:
    """Whatever is read inside the block is forgotten afterwards."""
    # Layers of other kinds may write in place (a recurrent state): they are copied whole.
    others = {i: copy.deepcopy(layer) for i, layer in enumerate(cache.layers) if not isinstance(layer, CompactLayer)}
    states = {i: layer.checkpoint() for i, layer in compact_layers(cache)}
    try:
        yield
    finally:
        for i, layer in compact_layers(cache):
            layer.restore(states[i])
        for i, saved in others.items():
            cache.layers[i] = saved


def repeat_ids(
    ids: torch.Tensor, visible: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and padding mask of the repeat pass: a request to repeat, then the document as its answer.

    Padding goes to the end, so that none stands between a row's document and its repetition.

    Args:
        limit: positions that the model has; what is beyond is cut off.

    Raises:
        UserError: a row's document leaves no position for the repetition.
    """
    prompt = ids.new_empty(0) if tokenizer is None else question_ids(tokenizer, REPEAT_PROMPT)[0].to(ids.device)
    rows = []
    for row, shown in zip(ids, visible, strict=True):
        document = row[shown]
        repeated, room = torch.cat([prompt, document]), limit - len(document)
        if room < 1:
            raise UserError("The document fills the model's context; use queries='context'.")
        if room < len(repeated):
            logger.warning(
                "Only %d of the %d tokens of the repeat pass fit the model's context: the compaction is less faithful "
                "than that of a shorter document; queries='context' may be better.",
                room,
                len(repeated),
            )
        rows.append(repeated[:room])
    longest = max(len(row) for row in rows)
    tokens = torch.stack([F.pad(row, (0, longest - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    return tokens, torch.arange(longest, device=ids.device) < lengths[:, None]


@torch.no_grad()
def self_study_ids(
    model: PreTrainedModel,
    cache: Cache,
    visible: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    new_tokens: int,
    seed: int,
    prompts: Sequence[str] = SELF_STUDY_PROMPTS,
) -> list[torch.Tensor]:
    """Conversations of the model with itself about the document: per prompt `[1, tokens]`, prompt and answer.

    Sampled at temperature 0.7, top-p 0.8, top-k 20 (the published settings).
    """
    if tokenizer is None:
        raise UserError("Self-study needs the tokenizer: pass tokenizer=... or use queries='repeat'.")
    if len(visible) != 1:
        raise UserError("Self-study takes one document at a time; use queries='repeat' for a batch.")
    device = visible.device
    conversations = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for prompt in prompts:
            start = question_ids(tokenizer, prompt).to(device)
            with rolled_back(cache):
                read = torch.cat([visible, torch.ones_like(start, dtype=torch.bool)], 1)
                # generate() finds the new tokens by the cache's length, so the document's ids are placeholders.
                ids = torch.cat([torch.zeros_like(visible, dtype=torch.int64), start], 1)
                output = model.generate(
                    input_ids=ids, attention_mask=read.long(), past_key_values=cache, max_new_tokens=new_tokens,
                    do_sample=True, temperature=0.7, top_p=0.8, top_k=20,
                )  # fmt: skip
            conversations.append(output[:, visible.shape[1] :])
    return conversations
