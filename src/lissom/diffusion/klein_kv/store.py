"""Keys and values of references that have been read, for as many requests as the bytes allow."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch

from lissom.errors import UserError
from lissom.models.byte_sizes import parse_bytes

Storage = Literal["model", "int8", "fp8"]
_LARGEST = {"int8": 127.0, "fp8": 448.0}


@dataclass(frozen=True)
class Packed:
    """A tensor as it is stored.

    Attributes:
        values: of the tensor's own type, int8, or float8_e4m3fn.
        scales: of each token and head where `values` are of 8 bits: `[..., tokens, heads, 1]`.
        dtype: of the tensor.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(tensor: torch.Tensor, storage: Storage) -> Packed:
    """Store `[..., tokens, heads, head_dim]`; 8 bits take the largest entry of each token and head as their largest."""
    if storage == "model":
        return Packed(tensor, None, tensor.dtype)
    wide = tensor.float()
    scales = wide.abs().amax(-1, keepdim=True) / _LARGEST[storage]
    divided = wide / scales.clamp(min=torch.finfo(torch.float32).tiny)
    values = divided.round().to(torch.int8) if storage == "int8" else divided.to(torch.float8_e4m3fn)
    return Packed(values, scales.to(torch.float16 if tensor.dtype.itemsize == 2 else torch.float32), tensor.dtype)


def unpack(packed: Packed) -> torch.Tensor:
    """What `pack` stored."""
    if packed.scales is None:
        return packed.values
    return (packed.values.float() * packed.scales.float()).to(packed.dtype)


@dataclass(frozen=True)
class Entry:
    """One sequence of references in every block.

    Attributes:
        keys, values: of each block, `[1, tokens, heads, head_dim]`, keys after rotation.
    """

    keys: tuple[Packed, ...]
    values: tuple[Packed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(packed.nbytes for packed in (*self.keys, *self.values))

    @property
    def tokens(self) -> int:
        """Tokens of all references of the entry."""
        return self.keys[0].values.shape[1]


class ReferenceStore:
    """Entries by key within a number of bytes; those that were not used for longest are forgotten first.

    Safe for several threads.

    Args:
        limit: bytes that are held at most, or text such as '64MB'.

    Attributes:
        hits, misses: of `get`.
    """

    def __init__(self, limit: int | str) -> None:
        self.limit = parse_bytes(limit)
        self.hits = self.misses = 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Entry | None:
        """The entry of that key, which is now the one used last."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                self.misses += 1
            else:
                self.hits += 1
                self._entries.move_to_end(key)
            return entry

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry.

        Raises:
            UserError: it alone has more bytes than are held at most.
        """
        if entry.nbytes > self.limit:
            raise UserError(
                f"{entry.tokens} tokens of references take {entry.nbytes / 1e6:.1f} MB, and the store holds "
                f"{self.limit / 1e6:.1f} MB: give it more, or fewer or smaller references."
            )
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)
            while sum(own.nbytes for own in self._entries.values()) > self.limit:
                self._entries.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes that are held now."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries.values())

    def entries(self) -> list[Entry]:
        """What is held, the one used last at the end."""
        with self._lock:
            return list(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)
