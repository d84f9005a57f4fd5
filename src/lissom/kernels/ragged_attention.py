"""Attention of a few queries over a ragged KV store: native, or the PyTorch reference."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from lissom.kernels import native


class KeyValues(ctypes.Structure):
    """Mirror of `struct KeyValues` in csrc/kernels.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("keys", "values", "key_scales", "value_scales", "bias", "positions", "starts", "lengths")
        ),
        *((name, ctypes.c_int64) for name in ("type", "capacity")),
    )


class Attention(ctypes.Structure):
    """Mirror of `struct Attention` in csrc/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "out", "lse", "sparse", "store", "mask", "holes")),
        *(
            (name, ctypes.c_int64)
            for name in (
                *(
                    "rows",
                    "query_heads",
                    "kv_heads",
                    "tokens",
                    "head_dim",
                    "masked",
                    "query_stride",
                    "out_stride",
                    "window",
                    "halves",
                ),
            )
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


native.mirror(1, KeyValues)
native.mirror(2, Attention)
KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def ragged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The meaning of `ragged_attention`, block by block in plain PyTorch."""
    rows, query_heads, queries, size = query.shape
    heads = len(starts) // rows
    grouped = query.float().reshape(rows * heads, -1, size)
    output = torch.zeros_like(grouped)
    for block, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if start < 0 or length < 0 or start + length > len(keys):
            raise ValueError(f"A block lies outside the {len(keys)} entries of the buffers.")
        span = slice(start, start + length)
        key, value = keys[span].float(), values[span].float()
        if key_scales is not None and value_scales is not None:
            key, value = key * key_scales[span, None].float(), value * value_scales[span, None].float()
        logits = grouped[block] @ key.T * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[span]
        if mask is None:
            visible = torch.ones(queries, length, dtype=torch.bool, device=query.device).tril(length - queries)
        else:
            visible = F.pad(mask[block // heads], (length - mask.shape[-1], 0), value=True)
        logits = logits.masked_fill(~visible.repeat(query_heads // heads, 1), -torch.inf)
        output[block] = torch.softmax(logits, -1).nan_to_num(0.0) @ value
    return output.reshape(query.shape).to(query.dtype)


@torch.library.custom_op("lissom::ragged_attention", mutates_args=())
def ragged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over blocks of different lengths, each read once for the whole group of its query heads.

    Args:
        query: `[rows, query_heads, queries, head_dim]`.
        keys, values: flat `[capacity, head_dim]`; block `row * kv_heads + head` is
            `[starts[block], starts[block] + lengths[block])`. What lies between blocks is never read.
        bias: fp32 `[capacity]`, added to the logits, or None.
        starts, lengths: int64 `[rows * kv_heads]` on the CPU.
        mask: bool `[rows, queries, masked]`, true = visible, for the last `masked` entries of every block; earlier
            entries are visible. None: query i of n sees all but the last n - 1 - i entries.
        scale: factor on query · key.
        key_scales, value_scales: fp16 `[capacity]` of int8 keys and values, which stand for code * scale.
        softcap: c of c * tanh(logit / c), before the bias; 0 is none.

    Returns:
        `[rows, query_heads, queries, head_dim]` in the dtype of `query`; zeros where a query sees nothing.

    Raises:
        ValueError: shapes that do not fit together, or a block outside the buffers.
    """
    _check(query, keys, values, bias, starts, lengths, mask)
    if native.library() is None or query.device.type != "cpu" or keys.dtype not in KV_TYPES:
        native.say_reference("ragged_attention", keys)
        return ragged_attention_reference(
            query, keys, values, bias, starts, lengths, mask, scale, key_scales, value_scales, softcap
        )
    vectors = query.transpose(1, 2).float().contiguous()
    keys, values = keys.contiguous(), values.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    starts, lengths = (part.to("cpu", torch.int64).contiguous() for part in (starts, lengths))
    mask = None if mask is None else mask.bool().contiguous()
    output = torch.empty_like(vectors)
    rows, query_heads, queries, size = query.shape
    tensors = (keys, values, key_scales, value_scales, bias, None, starts, lengths)
    store = KeyValues(*(None if t is None else t.data_ptr() for t in tensors), KV_TYPES[keys.dtype], len(keys))
    heads, masked = len(starts) // rows, 0 if mask is None else mask.shape[-1]
    arguments = Attention(
        vectors.data_ptr(),
        output.data_ptr(),
        None,
        None,
        ctypes.addressof(store),
        None if mask is None else mask.data_ptr(),
        None,
        *(rows, query_heads, heads, queries, size, masked, query_heads * size, query_heads * size, 0, 0),
        *(scale, softcap),
    )
    try:
        native.call("ragged_attention", arguments)
    except ValueError as error:
        raise ValueError(f"A block lies outside the {len(keys)} entries of the buffers.") from error
    return output.transpose(1, 2).to(query.dtype).contiguous()


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    rows, query_heads, queries, size = query.shape
    blocks = len(starts)
    if keys.ndim != 2 or keys.shape != values.shape or keys.shape[1] != size:
        raise ValueError(
            f"keys {tuple(keys.shape)} and values {tuple(values.shape)}: expected [capacity, {size}] both."
        )
    if starts.ndim != 1 or starts.shape != lengths.shape or blocks % rows or query_heads % max(1, blocks // rows):
        raise ValueError(f"{blocks} starts and {len(lengths)} lengths for {rows} rows of {query_heads} query heads.")
    if bias is not None and bias.shape != keys.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}: expected {(len(keys),)}.")
    if mask is not None and (mask.ndim != 3 or mask.shape[:2] != (rows, queries)):
        raise ValueError(f"mask {tuple(mask.shape)}: expected [{rows}, {queries}, masked].")


@ragged_attention.register_fake
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    softcap: float = 0.0,
) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)
