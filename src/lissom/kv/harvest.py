"""Reference queries: recording them, and the passes over the model that produce them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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
    """Collects a layer's rotated queries: of each row and pass a random sample of at most `limit` tokens, and the last.

    Attributes:
        own_mass: also keep the log mass of the pass's own tokens (see `Evidence`).
    """

    def __init__(self, limit: int, seed: int, own_mass: bool = False) -> None:
        self.limit, self.seed, self.own_mass = limit, seed, own_mass
        self._passes: list[list[torch.Tensor]] = []  # of each pass and row the logical positions of what is recorded
        self._picks: list[torch.Tensor] = []  # of each row of the announced pass the columns
        self._shown = torch.empty(0, 0, dtype=torch.bool)
        # By layer and row: of each pass `[query heads, tokens, head_dim]` and the log mass `[query heads, tokens]`.
        self._queries: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._masses: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._scaling: dict[int, float] = {}

    @contextmanager
    def recording(self, cache: Cache) -> Iterator[None]:
        """Record every forward pass inside the block."""
        layers = [layer for _, layer in compact_layers(cache)]
        before = [(layer.observer, layer.in_order) for layer in layers]
        for layer in layers:
            layer.observer, layer.in_order = self.observe, False
        try:
            yield
        finally:
            for layer, (observer, in_order) in zip(layers, before, strict=True):
                layer.observer, layer.in_order = observer, in_order

    def expect(self, first_position: int, visible: torch.Tensor) -> None:
        """Announce a forward pass over tokens from `first_position` with padding mask `visible` `[rows, tokens]`."""
        self._shown = visible
        self._picks = [self._pick(row.cpu().nonzero().flatten()) for row in visible]
        self._passes.append([first_position + picked for picked in self._picks])

    def _pick(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of a row's tokens are recorded, ascending; a row is sampled as it would be alone."""
        generator = torch.Generator().manual_seed(self.seed + len(self._passes))
        # The last tokens are TOVA's and SnapKV's whole evidence, and the best guess of what comes next.
        last = max(0, len(tokens) - min(_LAST, max(1, self.limit // 8)))
        others = torch.randperm(last, generator=generator)[: max(0, self.limit - (len(tokens) - last))].sort().values
        return tokens[torch.cat([others, torch.arange(last, len(tokens))])]

    def observe(self, layer: CompactLayer, query: torch.Tensor, scaling: float, first: int) -> None:
        """Keep the announced tokens' queries, which may come in stretches; the observer of a `CompactLayer`."""
        assert self._picks, "expect() comes before the forward pass"
        self._scaling[layer.index] = scaling
        last = first + query.shape[2]
        for row, picks in enumerate(self._picks):
            picked = picks[(picks >= first) & (picks < last)]
            queries = query[row, :, (picked - first).to(query.device)].detach()
            self._queries.setdefault((layer.index, row), []).append(queries)
            if self.own_mass:
                mass = _own_mass(layer, row, queries, scaling, picked, self._shown[row])
                self._masses.setdefault((layer.index, row), []).append(mass)

    def of(self, layer: CompactLayer, row: int, heads: int) -> Evidence | None:
        """See `QuerySource`."""
        key = layer.index, row
        if key not in self._queries:
            return None
        positions = torch.cat([rows[row] for rows in self._passes])
        mass = torch.cat(self._masses[key], 1) if self.own_mass else None
        every = torch.ones(len(positions), dtype=torch.bool)
        return Evidence.of(torch.cat(self._queries[key], 1), positions, every, heads, self._scaling[layer.index], mass)


def _own_mass(
    layer: CompactLayer, row: int, query: torch.Tensor, scaling: float, picked: torch.Tensor, shown: torch.Tensor
) -> torch.Tensor:
    """Log mass `[query heads, picked]` of the row's tail up to each picked query, without padding."""
    store = layer.store
    assert store is not None
    blocks = [store.block(row * store.heads + head) for head in range(store.heads)]
    keys = torch.stack([block.keys[len(block.keys) - layer.tail :] for block in blocks]).float()
    shown = shown[: layer.tail]
    bias = torch.zeros(shown.shape, device=keys.device).masked_fill_(~shown.to(keys.device), -torch.inf)
    found = attention_statistics(
        query.float().reshape(store.heads, -1, query.shape[-1]),
        keys,
        None,
        bias.expand(store.heads, -1),
        scaling,
        positions=torch.arange(layer.tail, device=keys.device).expand(store.heads, -1),
        query_positions=picked.to(keys.device).repeat(len(query) // store.heads),
    )
    return (found.top + found.mass.log()).view(query.shape[:-1])


# Whether this thread is in a pass of a compaction's own, which no other method may take for a prompt.
_own_pass: ContextVar[bool] = ContextVar("lissom_own_pass", default=False)


def in_own_pass() -> bool:
    """Whether the forward pass that is running belongs to a compaction."""
    return _own_pass.get()


@contextmanager
def _owning() -> Iterator[None]:
    token = _own_pass.set(True)
    try:
        yield
    finally:
        _own_pass.reset(token)


def forward(model: PreTrainedModel, ids: torch.Tensor, visible: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Read `ids` `[rows, tokens]` behind `cache`; logits of the last token `[rows, vocab]`.

    Args:
        visible: bool `[rows, tokens so far]`, the padding mask of everything read, `ids` included.
    """
    positions = (visible.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    mask = None if bool(visible.all()) else visible.long()
    with _owning():
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
    states = {i: layer.checkpoint() for i, layer in compact_layers(cache)}
    # Layers of other kinds may write in place (a recurrent state) or forget: they are copied whole.
    others = {i: copy.deepcopy(layer) for i, layer in enumerate(cache.layers) if i not in states}
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
            with _owning(), rolled_back(cache):
                read = torch.cat([visible, torch.ones_like(start, dtype=torch.bool)], 1)
                # generate() finds the new tokens by the cache's length, so the document's ids are placeholders.
                ids = torch.cat([torch.zeros_like(visible, dtype=torch.int64), start], 1)
                output = model.generate(
                    input_ids=ids, attention_mask=read.long(), past_key_values=cache, max_new_tokens=new_tokens,
                    do_sample=True, temperature=0.7, top_p=0.8, top_k=20,
                )  # fmt: skip
            conversations.append(output[:, visible.shape[1] :])
    return conversations
