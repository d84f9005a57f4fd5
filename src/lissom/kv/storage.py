"""Ragged storage of keys and values: one contiguous block with its own length per row and KV head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from lissom.errors import UserError
from lissom.kernels import pages
from lissom.kernels.ragged_attention import KV_TYPES, KeyValues

_layouts = count()


@dataclass
class Block:
    """The entries of one (row, KV head): `keys` and `values` `[entries, head_dim]`, `positions` `[entries]`.

    `bias` `[entries]` (fp32) is added to the attention logits: e^bias says for how many original keys an entry
    stands. None means zero everywhere.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    bias: torch.Tensor | None = None


def to_int8(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`vectors` `[..., head_dim]` as int8 codes and fp16 scales `[...]`: value = code * scale."""
    vectors = vectors.float()
    scales = (vectors.abs().amax(-1) / 127).to(torch.float16)
    steps = scales.float()
    inverse = torch.where(steps > 0, 1 / steps, 0.0)
    return (vectors * inverse[..., None]).round().clamp(-127, 127).to(torch.int8), scales


class RaggedStore:
    """Blocks of all rows and KV heads of one layer in one flat buffer each for keys, values, biases and positions.

    Block `i = row * heads + head` is `[starts[i], starts[i] + lengths[i])` of the buffers; the space up to the next
    block is spare capacity, whose content is never read.

    Attributes:
        keys, values: `[capacity, head_dim]`: the model's dtype, bf16, or int8.
        key_scales, value_scales: `[capacity]` fp16 of int8 keys and values, else None.
        bias: `[capacity]` fp32, or None while every bias is zero.
        positions: `[capacity]` int32, the logical position that each entry came from.
        starts, lengths: `[rows * heads]` int64, on the CPU.
        spare: entries for which every block has room.
        layout: a number that changes when the buffers move.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    spare: int
    layout: int
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def __init__(self, blocks: Sequence[Block], rows: int, spare: int = 0, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the stored keys and values; None takes the blocks' own."""
        self.rows, self.heads = rows, len(blocks) // rows
        self.dtype = dtype or blocks[0].keys.dtype
        biased = any(block.bias is not None for block in blocks)
        self._lay_out([self._columns(block, biased) for block in blocks], spare)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose buffers are others."""
        self.__dict__.update(state)
        self.layout = next(_layouts)

    def _columns(self, block: Block, biased: bool) -> dict[str, torch.Tensor]:
        """What of a block goes into which buffer."""
        columns = {"positions": block.positions.to(torch.int32)} | self._stored(block.keys, block.values)
        if biased:
            zero = torch.zeros(len(block.keys), dtype=torch.float32, device=block.keys.device)
            columns["bias"] = zero if block.bias is None else block.bias.float()
        return columns

    def _stored(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.dtype != torch.int8:
            return {"keys": keys.to(self.dtype), "values": values.to(self.dtype)}
        (keys, key_scales), (values, value_scales) = to_int8(keys), to_int8(values)
        return {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}

    def _lay_out(self, blocks: Sequence[dict[str, torch.Tensor]], spare: int) -> None:
        # What is made in inference mode could not be changed outside of it, where the cache may be used next.
        with torch.inference_mode(False), torch.no_grad():
            lengths = torch.tensor([len(block["keys"]) for block in blocks], dtype=torch.int64, device="cpu")
            ends = torch.cumsum(lengths + spare, 0)
            starts = ends - lengths - spare
            new: dict[str, Any] = {}
            for name, column in blocks[0].items():
                buffer = new[name] = pages.zeros(column, (int(ends[-1]), *column.shape[1:]))
                for start, block in zip(starts.tolist(), blocks, strict=True):
                    buffer[start : start + len(block[name])] = block[name]
        # All at once: an interrupt must not leave old buffers under new lengths.
        self.__dict__.update(new, lengths=lengths, starts=starts, spare=spare, layout=next(_layouts))

    def buffers(self) -> dict[str, torch.Tensor]:
        """What there is of keys, values, scales, bias and positions, by name."""
        names = ("keys", "values", "key_scales", "value_scales", "bias", "positions")
        return {name: buffer for name in names if (buffer := getattr(self, name)) is not None}

    def _raw(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.starts[index])
        span = slice(start, start + int(self.lengths[index]))
        return {name: buffer[span] for name, buffer in self.buffers().items()}

    def entries(self) -> dict[str, torch.Tensor]:
        """Copies of all blocks as they are stored, one after the other, by name of the buffer."""
        raw = [self._raw(index) for index in range(self.rows * self.heads)]
        return {name: torch.cat([block[name] for block in raw]) for name in raw[0]}

    def block(self, index: int) -> Block:
        """Block `index`: views, but for int8 keys and values, which come as fp32."""
        raw = self._raw(index)
        keys, values = raw["keys"], raw["values"]
        if self.dtype == torch.int8:
            keys = keys.float() * raw["key_scales"][:, None].float()
            values = values.float() * raw["value_scales"][:, None].float()
        return Block(keys, values, raw["positions"], raw.get("bias"))

    def blocks(self) -> list[Block]:
        return [self.block(index) for index in range(self.rows * self.heads)]

    def replaced(self, blocks: Sequence[Block], rows: int | None = None) -> RaggedStore:
        """A store of other blocks, in the same dtype."""
        return RaggedStore(blocks, rows or self.rows, dtype=self.dtype)

    def converted(self, dtype: torch.dtype) -> RaggedStore:
        """The same entries, and room for as many more, in another dtype."""
        return RaggedStore(self.blocks(), self.rows, self.spare, dtype)

    def _again(self, spare: int) -> None:
        self._lay_out([self._raw(index) for index in range(self.rows * self.heads)], spare)

    def make_room(self, tokens: int) -> None:
        """Have room for `tokens` more entries in every block; the capacity grows by doubling."""
        if tokens > self.spare:
            # 64 tokens are enough for a short answer.
            self._again(tokens + max(64, int(self.lengths.max())))

    def append(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> None:
        """Add `keys` and `values` `[rows, heads, tokens, head_dim]` to the end of every block, with bias zero."""
        keys, values = keys.detach(), values.detach()
        rows, heads, tokens, _ = keys.shape
        self.check_rows(rows, heads)
        self.make_room(tokens)
        offsets = torch.arange(tokens, device="cpu")
        slots = ((self.starts + self.lengths)[:, None] + offsets).flatten().to(self.keys.device)
        for name, column in self._stored(keys.flatten(0, 2), values.flatten(0, 2)).items():
            getattr(self, name)[slots] = column
        positions = (first_position + offsets).to(torch.int32).repeat(rows * heads)
        self.positions[slots] = positions.to(self.keys.device)
        if self.bias is not None:
            self.bias[slots] = 0.0
        self.lengths += tokens
        self.spare -= tokens

    def check_rows(self, rows: int, heads: int) -> None:
        """Raise a `UserError` where a batch does not fit what is stored."""
        if (rows, heads) != (self.rows, self.heads):
            raise UserError(
                f"The cache holds {self.rows} rows of {self.heads} KV heads, the input has {rows} rows of {heads}."
            )

    @property
    def head_dim(self) -> int:
        """Size of a key or value."""
        return self.keys.shape[1]

    @property
    def uncounted(self) -> int:
        """Entries that a native pass has appended and `spare` does not know of yet."""
        return int(self.starts[-1] + self.lengths[-1]) + self.spare - len(self.keys)

    def drop_last(self, tokens: int) -> None:
        """Remove the last `tokens` entries of every block."""
        self._check_drop(tokens)
        self.lengths -= tokens
        self.spare += tokens

    def drop_first(self, tokens: int) -> None:
        """Remove the first `tokens` entries of every block. Their space comes back with the next change of layout."""
        self._check_drop(tokens)
        self.layout = next(_layouts)  # first: no call comes between the others, so no interrupt does
        self.starts += tokens
        self.lengths -= tokens

    def _check_drop(self, tokens: int) -> None:
        shortest = int(self.lengths.min())
        if not 0 <= tokens <= shortest:
            raise ValueError(f"{tokens} entries cannot be removed from blocks of which one has {shortest}.")

    def reserve(self, spare: int) -> None:
        """Have room for exactly `spare` more entries in every block; 0 gives all spare capacity back."""
        if self.spare != spare:
            self._again(spare)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows: row `i` becomes what was row `rows[i]`."""
        wanted = rows.tolist()
        raw = [self._raw(row * self.heads + head) for row in wanted for head in range(self.heads)]
        self.rows = len(wanted)
        self._lay_out(raw, self.spare)

    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Dense keys and values `[rows, heads, longest, head_dim]`, blocks aligned at their *ends*, and the bias.

        The bias `[rows, heads, longest]` is -inf where a block has no entry; None where nothing is padded or biased.
        int8 keys and values come as fp32.
        """
        longest, shape = int(self.lengths.max()), (self.rows, self.heads)
        missing = longest - self.lengths
        place = torch.arange(longest, device="cpu")
        slots = (self.starts - missing)[:, None] + place
        absent = place < missing[:, None]
        slots = slots.masked_fill(absent, 0).flatten().to(self.keys.device)
        absent = absent.flatten().to(self.keys.device)
        keys, values = self.keys[slots], self.values[slots]
        if self.key_scales is not None and self.value_scales is not None:
            keys = keys.float() * self.key_scales[slots, None].float()
            values = values.float() * self.value_scales[slots, None].float()
        dense = (*shape, longest, self.head_dim)
        if self.bias is None and not missing.any():
            return keys.view(dense), values.view(dense), None
        bias = keys.new_zeros(slots.shape, dtype=torch.float32) if self.bias is None else self.bias[slots]
        bias = bias.masked_fill(absent, -torch.inf)
        # Whatever lies there, another block's NaN perhaps, must not get into a product with a weight of zero.
        keys, values = (vectors.masked_fill(absent[:, None], 0.0) for vectors in (keys, values))
        return keys.view(dense), values.view(dense), bias.view(*shape, longest)

    def native(self) -> KeyValues:
        """The native kernels' view, which holds until `layout` changes. It does not keep the store alive."""
        parts = (self.keys, self.values, self.key_scales, self.value_scales, self.bias, self.positions)
        pointers = [None if part is None else part.data_ptr() for part in (*parts, self.starts, self.lengths)]
        return KeyValues(*pointers, KV_TYPES[self.dtype], len(self.keys))

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry: key, value, scales, position and bias if there are any."""
        return sum(buffer[:1].nbytes for buffer in self.buffers().values())

    @property
    def stored_entries(self) -> int:
        """Entries of all rows and heads together."""
        return int(self.lengths.sum())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the entries: keys, values, positions and biases, without spare capacity."""
        return self.stored_entries * self.entry_bytes

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, spare capacity included."""
        return sum(buffer.nbytes for buffer in self.buffers().values())
