"""One pass of many queries over all entries of each head: native, or the PyTorch reference."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from lissom.kernels import native
from lissom.kernels.matmul import matmul

REDUCTIONS = ("rms", "mean", "max")
_CHUNK = 768  # queries whose partial sums are kept apart: the unit of work of a thread
_REFERENCE_CHUNK = 256


class _Arguments(ctypes.Structure):
    """Mirror of `struct AttentionStatistics` in csrc/kernels.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "keys", "values", "bias", "positions", "query_positions", "elsewhere")
        ),
        *((name, ctypes.c_void_p) for name in ("top", "mass", "outputs", "scores", "largest")),
        *((name, ctypes.c_int64) for name in ("heads", "queries", "entries", "head_dim", "chunk", "reduction")),
        ("scale", ctypes.c_float),
    )


class Statistics(NamedTuple):
    """What one pass over all queries and entries gives.

    Attributes:
        top: `[heads, queries]`, the largest logit of each query, 0 where it sees nothing.
        mass: `[heads, queries]`, the sum of e^(logit - top).
        outputs: softmax(logits) · values `[heads, queries, head_dim]`; empty where no values were given.
        scores: of each entry `[heads, entries]`: its attention weight, reduced over the queries.
        largest: of each entry `[heads, entries]`: the largest weight that any query gives it.
    """

    top: torch.Tensor
    mass: torch.Tensor
    outputs: torch.Tensor
    scores: torch.Tensor
    largest: torch.Tensor

    def head(self, index: int) -> Statistics:
        """What belongs to one head."""
        return Statistics(*(part[index : index + 1] for part in self))


def attention_statistics(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor,
    scale: float,
    reduction: str = "rms",
    positions: torch.Tensor | None = None,
    query_positions: torch.Tensor | None = None,
    elsewhere: torch.Tensor | None = None,
) -> Statistics:
    """Softmax attention of every query over the entries of its head, summed up per query and per entry.

    Args:
        query: `[heads, queries, head_dim]`, fp32 as all that follows.
        keys, values: `[heads, entries, head_dim]`; no values, no outputs.
        bias: `[heads, entries]`, added to the logits; -inf hides an entry.
        scale: factor on query · key.
        reduction: of the scores, one of `REDUCTIONS`.
        positions, query_positions: `[heads, entries]` and `[queries]`: a query sees no later entry. None: it sees all.
        elsewhere: `[heads, queries]`, log mass that each query finds elsewhere; it counts in `largest` alone.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}.")
    parts = torch.ops.lissom.attention_statistics(
        query, keys, values, bias, scale, REDUCTIONS.index(reduction), positions, query_positions, elsewhere
    )
    return Statistics(*parts)


@torch.library.custom_op("lissom::attention_statistics", mutates_args=())
def _operator(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor,
    scale: float,
    reduction: int,
    positions: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    elsewhere: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(query, keys, values, bias, positions, query_positions, elsewhere)
    if native.library() is None or query.device.type != "cpu" or query.dtype != torch.float32:
        native.say_reference("attention_statistics", query)
        return attention_statistics_reference(
            query, keys, values, bias, scale, reduction, positions, query_positions, elsewhere
        )
    heads, queries, size = query.shape
    entries = keys.shape[1]
    chunks = -(-queries // _CHUNK)
    top, mass = query.new_empty(heads, queries), query.new_empty(heads, queries)
    outputs = query.new_empty(query.shape if values is not None else (0,))
    scores, largest = (query.new_empty(heads, chunks, entries) for _ in range(2))
    floats = [None if part is None else part.float().contiguous() for part in (query, keys, values, bias)]
    places = [None if part is None else part.long().contiguous() for part in (positions, query_positions)]
    given = [*floats, *places, None if elsewhere is None else elsewhere.float().contiguous()]
    arguments = _Arguments(
        *(None if part is None else part.data_ptr() for part in given),
        *(part.data_ptr() for part in (top, mass, outputs, scores, largest)),
        heads, queries, entries, size, _CHUNK, reduction, scale,
    )  # fmt: skip
    native.call("attention_statistics", arguments)
    return top, mass, outputs, _reduced(scores, reduction, queries), largest.amax(1)


@_operator.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor,
    scale: float,
    reduction: int,
    positions: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    elsewhere: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = query.new_empty(query.shape if values is not None else (0,))
    per_query, per_entry = query.shape[:2], keys.shape[:2]
    shapes = (per_query, per_query, per_entry, per_entry)
    top, mass, scores, largest = (query.new_empty(shape) for shape in shapes)
    return top, mass, outputs, scores, largest


def attention_statistics_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor,
    scale: float,
    reduction: int,
    positions: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    elsewhere: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The meaning of `attention_statistics` in plain PyTorch, some queries at a time: the whole matrix never exists."""
    tops, masses, outputs, scores, largest = [], [], [], [], torch.zeros_like(bias)
    for start in range(0, query.shape[1], _REFERENCE_CHUNK):
        span = slice(start, start + _REFERENCE_CHUNK)
        logits = matmul(query[:, span] * scale, keys.mT).add_(bias[:, None])
        if positions is not None and query_positions is not None:
            logits.masked_fill_(positions[:, None] > query_positions[span, None], -torch.inf)
        top = logits.amax(-1, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        features = logits.sub_(top).exp_()
        mass = features.sum(-1, keepdim=True)
        # What is divided by the mass are the small results, not the features.
        share = weight = 1.0 / mass.clamp(min=1.0)  # the largest logit counts 1: less is a query that sees nothing
        if values is not None:
            outputs.append(matmul(features, values).mul_(share))
        if elsewhere is not None:
            weight = 1.0 / (mass + torch.exp(elsewhere[:, span, None] - top)).clamp(min=1.0)
        largest = torch.maximum(largest, (features * weight).amax(1))
        if REDUCTIONS[reduction] == "max":
            scores.append(features.mul_(share).amax(1))
        elif REDUCTIONS[reduction] == "mean":
            scores.append((share.mT @ features)[:, 0])
        else:
            scores.append((share.square().mT @ features.square_())[:, 0])
        tops.append(top[..., 0])
        masses.append(mass[..., 0])
    output = torch.cat(outputs, 1) if values is not None else query.new_empty(0)
    reduced = _reduced(torch.stack(scores, 1), reduction, query.shape[1])
    return torch.cat(tops, 1), torch.cat(masses, 1), output, reduced, largest


def _reduced(partial: torch.Tensor, reduction: int, queries: int) -> torch.Tensor:
    """Scores `[heads, entries]` of the sums or maxima `[heads, chunks, entries]` of each chunk of queries."""
    if REDUCTIONS[reduction] == "max":
        return partial.amax(1)
    mean = partial.sum(1) / queries
    return mean if REDUCTIONS[reduction] == "mean" else mean.sqrt()


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    bias: torch.Tensor,
    positions: torch.Tensor | None,
    query_positions: torch.Tensor | None,
    elsewhere: torch.Tensor | None,
) -> None:
    if query.ndim != 3:
        raise ValueError(f"query {tuple(query.shape)}: expected [heads, queries, head_dim].")
    heads, queries, size = query.shape
    if keys.ndim != 3 or keys.shape[::2] != (heads, size) or (values is not None and values.shape != keys.shape):
        raise ValueError(f"keys {tuple(keys.shape)}: expected [{heads}, entries, {size}], and values of that shape.")
    if not queries or not keys.shape[1]:
        raise ValueError("There must be a query and an entry.")
    if bias.shape != keys.shape[:2]:
        raise ValueError(f"bias {tuple(bias.shape)}: expected {tuple(keys.shape[:2])}.")
    if (positions is None) != (query_positions is None):
        raise ValueError("positions and query_positions go together.")
    for name, part, shape in (
        ("positions", positions, (heads, keys.shape[1])),
        ("query_positions", query_positions, (queries,)),
        ("elsewhere", elsewhere, (heads, queries)),
    ):
        if part is not None and part.shape != shape:
            raise ValueError(f"{name} {tuple(part.shape)}: expected {shape}.")
