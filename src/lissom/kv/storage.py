"""Ragged storage of keys and values: one contiguous block with its own length per row and KV head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lissom.errors import UserError


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


class RaggedStore:
    """Blocks of all rows and KV heads of one layer in one flat buffer each for keys, values, biases and positions.

    Block `i = row * heads + head` is `[starts[i], starts[i] + lengths[i])` of the buffers; the space up to the next
    block is spare capacity, whose content is never read.

    Attributes:
        keys, values: `[capacity, head_dim]`, the model's dtype.
        bias: `[capacity]` fp32, or None while every bias is zero.
        positions: `[capacity]` int32, the logical position that each entry came from.
        starts, lengths: `[rows * heads]` int64, on the CPU.
    """

    def __init__(self, blocks: Sequence[Block], rows: int, spare: int = 0) -> None:
        self.rows, self.heads = rows, len(blocks) // rows
        self._lay_out(blocks, spare)

    def _lay_out(self, blocks: Sequence[Block], spare: int) -> None:
        self.lengths = torch.tensor([len(block.keys) for block in blocks], dtype=torch.int64)
        ends = torch.cumsum(self.lengths + spare, 0)
        self.starts = ends - self.lengths - spare
        self.spare = spare
        first = blocks[0]
        capacity, device = int(ends[-1]), first.keys.device
        self.keys = torch.zeros(capacity, first.keys.shape[-1], dtype=first.keys.dtype, device=device)
        self.values = torch.zeros(capacity, first.values.shape[-1], dtype=first.values.dtype, device=device)
        self.positions = torch.zeros(capacity, dtype=torch.int32, device=device)
        biased = any(block.bias is not None for block in blocks)
        self.bias = torch.zeros(capacity, dtype=torch.float32, device=device) if biased else None
        for start, block in zip(self.starts.tolist(), blocks, strict=True):
            span = slice(start, start + len(block.keys))
            self.keys[span], self.values[span], self.positions[span] = block.keys, block.values, block.positions
            if self.bias is not None and block.bias is not None:
                self.bias[span] = block.bias

    def block(self, index: int) -> Block:
        """Views of block `index`."""
        start = int(self.starts[index])
        span = slice(start, start + int(self.lengths[index]))
        bias = None if self.bias is None else self.bias[span]
        return Block(self.keys[span], self.values[span], self.positions[span], bias)

    def blocks(self) -> list[Block]:
        return [self.block(index) for index in range(self.rows * self.heads)]

    def append(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> None:
        """Add `keys` and `values` `[rows, heads, tokens, head_dim]` to the end of every block, with bias zero."""
        keys, values = keys.detach(), values.detach()
        rows, heads, tokens, _ = keys.shape
        if (rows, heads) != (self.rows, self.heads):
            raise UserError(
                f"The cache holds {self.rows} rows of {self.heads} KV heads, the input has {rows} rows of {heads}."
            )
        if tokens > self.spare:
            # An eighth of the length keeps the copying amortised; 64 tokens are enough for a short answer.
            self._lay_out(self.blocks(), tokens + max(64, int(self.lengths.max()) // 8))
        offsets = torch.arange(tokens)
        slots = ((self.starts + self.lengths)[:, None] + offsets).flatten().to(self.keys.device)
        self.keys[slots] = keys.reshape(-1, keys.shape[-1])
        self.values[slots] = values.reshape(-1, values.shape[-1])
        positions = (first_position + offsets).to(torch.int32).repeat(rows * heads)
        self.positions[slots] = positions.to(self.keys.device)
        if self.bias is not None:
            self.bias[slots] = 0.0
        self.lengths += tokens
        self.spare -= tokens

    def drop_last(self, tokens: int) -> None:
        """Remove the last `tokens` entries of every block."""
        self.lengths -= tokens
        self.spare += tokens

    def reserve(self, spare: int) -> None:
        """Have room for exactly `spare` more entries in every block; 0 gives all spare capacity back."""
        if self.spare != spare:
            self._lay_out(self.blocks(), spare)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Keep, repeat or reorder rows: row `i` becomes what was row `rows[i]`."""
        wanted = rows.tolist()
        blocks = [self.block(row * self.heads + head) for row in wanted for head in range(self.heads)]
        self.rows = len(wanted)
        self._lay_out(blocks, self.spare)

    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Dense keys and values `[rows, heads, longest, head_dim]`, blocks aligned at their *ends*, and the bias.

        The bias `[rows, heads, longest]` is -inf where a block has no entry; None where nothing is padded or biased.
        """
        longest, shape = int(self.lengths.max()), (self.rows, self.heads)
        missing = longest - self.lengths
        slots = (self.starts - missing)[:, None] + torch.arange(longest)
        absent = torch.arange(longest) < missing[:, None]
        slots = slots.masked_fill(absent, int(self.starts[0])).flatten().to(self.keys.device)
        keys = self.keys[slots].view(*shape, longest, -1)
        values = self.values[slots].view(*shape, longest, -1)
        if self.bias is None and not missing.any():
            return keys, values, None
        bias = self.keys.new_zeros(slots.shape, dtype=torch.float32) if self.bias is None else self.bias[slots]
        bias = bias.masked_fill(absent.flatten().to(bias.device), -torch.inf)
        return keys, values, bias.view(*shape, longest)

    @property
    def stored_entries(self) -> int:
        """Entries of all rows and heads together."""
        return int(self.lengths.sum())

    @property
    def stored_bytes(self) -> int:
        """Bytes of the entries: keys, values, positions and biases, without spare capacity."""
        per_entry = self.nbytes // max(1, len(self.keys))
        return self.stored_entries * per_entry

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated, spare capacity included."""
        tensors = (self.keys, self.values, self.positions, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)
