"""`sparse_prefill`: causal attention of a prompt over the blocks that matter, with the fastest kernel there is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from operator import index
from types import ModuleType
from typing import Literal

import torch

from lissom.attention.flash_prefill import reference, selection
from lissom.errors import UserError
from lissom.kernels import native
from lissom.kernels.blocks import SIZES, Layout, Rules
from lissom.kernels.sparse_attention import SparseAttention, sparse_attention
from lissom.models.method import check_types

logger = logging.getLogger(__name__)

Precision = Literal["auto", "exact", "bf16"]
# Gives bool `[lists, tiles, blocks]` from (query, keys, layout, scale) of one sequence.
Select = Callable[[torch.Tensor, torch.Tensor, Layout, float], torch.Tensor]
_DEEPEST = 256  # head_dim that Triton's kernels have room for
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.disable  # whose graphs know neither addresses nor what depends on numbers
def sparse_prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    alpha: float | torch.Tensor = 0.1,
    rules: Rules | None = None,
    scale: float | None = None,
    padding: Sequence[int] | None = None,
    select: Select | None = None,
    precision: Precision = "auto",
    estimate: bool = False,
) -> SparseAttention:
    """Softmax attention of the last tokens of each sequence, causal, over the blocks of keys that matter to them.

    On the CPU the native kernel chooses the blocks and attends; on a GPU Triton's do, where Triton is installed;
    otherwise, and for what those do not know, the same is computed in PyTorch.

    Args:
        query: `[rows, query heads, tokens, head_dim]`, those of the last `tokens` of the keys.
        key, value: `[rows, KV heads, entries, head_dim]`.
        alpha: blocks below this share of the largest energy are left out; a number, or one for each query head. 0 is
            dense, above 1 only the blocks that are always met remain.
        rules: how blocks are cut and chosen; default `Rules()`, which is the paper's (V1).
        scale: factor on query · key; default head_dim ** -0.5.
        padding: entries before the first real one, for each row.
        select: chooses the blocks instead of the rules' scoring: called for each row with the query `[query heads,
            tokens, head_dim]`, the keys `[KV heads, entries, head_dim]`, the `Layout` and the scale, of what is no
            padding; returns bool `[lists, tiles, blocks]`. Those that are always met are added.
        precision: of products on the CPU. `exact` is fp32; `bf16` rounds queries, keys, values and weights to bf16
            where the processor multiplies those faster, with sums in fp32, as FlashAttention does; `auto` is the dtype
            of the inputs.
        estimate: also estimate what share of the attention was left out.

    Raises:
        UserError: shapes, dtypes or settings that do not fit together; gradients are wanted.
    """
    rules = Rules() if rules is None else rules
    _check_inputs(query, key, value)
    _check_rules(rules)
    if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
        raise UserError(f"scale={scale!r}: expected a finite number.")
    if precision not in ("auto", "exact", "bf16"):
        raise UserError(f"precision={precision!r}: expected auto, exact or bf16.")
    if select is not None and not callable(select):
        raise UserError(f"select={select!r}: expected a function.")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    alphas, pads = _thresholds(alpha, query.shape[1]), _pads(padding, len(query), key.shape[2])
    if query.is_cpu and native.library() is not None and rules.size in SIZES and query.dtype in _DTYPES:
        given = None
        if select is not None:
            given = _per_row(query, key, rules, pads, lambda q, k, layout: _chosen(q, k, layout, scale, select, alphas))
        halves = precision == "bf16" or (precision == "auto" and query.dtype == torch.bfloat16)
        if precision == "exact":
            key, value = key.float(), value.float()
        return sparse_attention(
            query, key, value, rules if given is None else rules.given(), alpha=alphas, scale=scale, padding=pads,
            selected=given, halves=halves, estimate=estimate,
        )  # fmt: skip
    return _plain(query, key, value, rules, alphas, scale, pads, select, estimate)


def _chosen(
    query: torch.Tensor, key: torch.Tensor, layout: Layout, scale: float, select: Select, alpha: torch.Tensor
) -> torch.Tensor:
    chosen = select(query, key, layout, scale)
    lists = len(query) // layout.group
    wanted = [lists, layout.tiles, layout.blocks]
    if not isinstance(chosen, torch.Tensor) or chosen.dtype != torch.bool or list(chosen.shape) != wanted:
        raise UserError(f"select gave {getattr(chosen, 'shape', chosen)}: expected bool {wanted}.")
    dense = alpha[:: layout.group].view(-1, 1, 1) <= 0
    return selection.with_forced(chosen | dense.to(chosen.device), layout)


def _per_row(
    query: torch.Tensor,
    key: torch.Tensor,
    rules: Rules,
    padding: list[int],
    choose: Callable[[torch.Tensor, torch.Tensor, Layout], torch.Tensor],
) -> torch.Tensor:
    """Selections of all rows, bool `[rows, lists, tiles, blocks]`, each in the corner of the largest one's extents."""
    (heads, tokens), (kv_heads, entries) = query.shape[1:3], key.shape[1:3]
    shape = rules.selection(heads, kv_heads, tokens, entries, padding)
    whole = torch.zeros(shape, dtype=torch.bool, device=query.device)
    for row, pad in enumerate(padding):
        if pad < entries:
            q, k, _ = _real(query[row], key[row], key[row], pad)
            part = choose(q, k, rules.layout(q.shape[1], k.shape[1], heads // kv_heads))
            whole[row, :, : part.shape[1], : part.shape[2]] = part
    return whole


def _real(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row without its padding."""
    tokens = min(query.shape[1], key.shape[1] - padding)
    return query[:, query.shape[1] - tokens :], key[:, padding:], value[:, padding:]


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rules: Rules,
    alpha: torch.Tensor,
    scale: float,
    padding: list[int],
    select: Select | None,
    estimate: bool,
) -> SparseAttention:
    """By Triton, or in PyTorch, one row at a time."""
    lacking = f"blocks of {rules.size}" if rules.size not in SIZES else ""
    if query.is_cuda and query.shape[3] > _DEEPEST:
        lacking = f"head_dim {query.shape[3]}"
    kernels = _triton() if query.is_cuda and not lacking and query.dtype in _DTYPES else None
    if kernels is None:
        native.say_reference("sparse_prefill", query, lacking)
    compute, group = (kernels or reference).sparse_attention, query.shape[1] // key.shape[1]

    def of_row(row: int) -> tuple[torch.Tensor, ...]:
        q, k, v = _real(query[row], key[row], value[row], padding[row])
        layout = rules.layout(q.shape[1], k.shape[1], group)
        selected = None if select is None else _chosen(q, k, layout, scale, select, alpha)
        found: tuple[torch.Tensor, ...] = compute(q, k, v, layout, scale, alpha, selected, estimate)
        return found

    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    unmeasured = query.new_empty(0, dtype=dtype)
    if len(query) == 1 and not padding[0]:
        output, lse, selected, dropped = (part[None] for part in of_row(0))
        return SparseAttention(output, lse, selected, dropped if estimate else unmeasured, unmeasured)
    shape = rules.selection(query.shape[1], key.shape[1], query.shape[2], key.shape[2], padding)
    out = SparseAttention(
        torch.zeros_like(query, memory_format=torch.contiguous_format),
        query.new_full(query.shape[:3], -torch.inf, dtype=dtype),
        torch.zeros(shape, dtype=torch.bool, device=query.device),
        query.new_zeros(query.shape[:3] if estimate else 0, dtype=dtype),
        unmeasured,
    )
    for row, pad in enumerate(padding):
        if pad == key.shape[2]:
            continue
        output, lse, selected, dropped = of_row(row)
        first = query.shape[2] - output.shape[1]
        out.output[row, :, first:], out.lse[row, :, first:] = output, lse
        out.selected[row, :, : selected.shape[1], : selected.shape[2]] = selected
        if estimate:
            out.dropped[row, :, first:] = dropped
    return out


@cache
def _triton() -> ModuleType | None:
    try:
        from lissom.kernels import sparse_attention_triton
    except ImportError as error:
        logger.warning("sparse_prefill runs in PyTorch on the GPU: %s.", error)
        return None
    return sparse_attention_triton


def _check_inputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, part in (("query", query), ("key", key), ("value", value)):
        if not isinstance(part, torch.Tensor):
            raise UserError(f"{name} is of {type(part).__module__}.{type(part).__name__}: expected a torch.Tensor.")
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise UserError(
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}: expected "
            "[rows, heads, tokens, head_dim], keys and values alike."
        )
    rows, heads, tokens, size = query.shape
    if not query.numel() or not key.numel():
        raise UserError(f"query {list(query.shape)}, key {list(key.shape)}: there is nothing to attend to.")
    if key.shape[0] != rows or key.shape[3] != size or heads % key.shape[1] or not 1 <= tokens <= key.shape[2]:
        raise UserError(
            f"query {list(query.shape)} does not fit key {list(key.shape)}: rows and head_dim must be the same, "
            "the query heads a multiple of the KV heads, and the queries those of the last keys."
        )
    if query.dtype not in (*_DTYPES, torch.float64) or not query.dtype == key.dtype == value.dtype:
        raise UserError(
            f"query {query.dtype}, key {key.dtype}, value {value.dtype}: expected one floating-point dtype of 16 bits "
            "or more."
        )
    if query.is_meta or not query.device == key.device == value.device:
        raise UserError(
            f"query on {query.device}, key on {key.device}, value on {value.device}: expected one device that has "
            "numbers."
        )
    if torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value)):
        raise UserError("sparse_prefill has no gradient: call it under torch.no_grad(), or attend densely to train.")


def _check_rules(rules: Rules) -> None:
    if not isinstance(rules, Rules):
        raise UserError(f"rules={rules!r}: expected lissom.attention.flash_prefill.Rules.")
    check_types(rules)
    for name, least in (("size", 1), ("sink", 0), ("window", 0), ("last", 0), ("following", 0)):
        if getattr(rules, name) < least:
            raise UserError(f"{name}={getattr(rules, name)}: expected an integer of at least {least}.")
    if rules.scoring not in ("flashprefill", "row-normalised"):
        raise UserError(f"scoring={rules.scoring!r}: expected flashprefill or row-normalised.")


def _thresholds(alpha: float | torch.Tensor, heads: int) -> torch.Tensor:
    """fp32 `[heads]`."""
    try:
        alphas = torch.as_tensor(alpha, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"alpha={alpha!r}: expected a number, or one for each query head.") from error
    if alphas.shape not in ((), (1,), (heads,)) or not bool(((alphas >= 0) & alphas.isfinite()).all()):
        raise UserError(f"alpha={alpha} is not in [0, ∞): expected a number, or one for each of {heads} query heads.")
    return alphas.expand(heads)


def _pads(padding: Sequence[int] | None, rows: int, entries: int) -> list[int]:
    """Of each row."""
    try:
        pads = [0] * rows if padding is None else [index(pad) for pad in padding]
    except TypeError as error:
        raise UserError(f"padding={padding!r}: expected an integer for each row.") from error
    if len(pads) != rows or not all(0 <= pad <= entries for pad in pads):
        raise UserError(f"padding={pads}: expected at most {entries} entries for each of {rows} rows.")
    return pads
