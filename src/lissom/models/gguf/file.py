"""The container: metadata and tensors of a GGUF file, read where they lie.

`gguf.GGUFReader` keeps a view for every string of a vocabulary, which takes seconds; only tensors and plain values
are needed here. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lissom.errors import UserError

_PLAIN = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4  # as in ggml


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        shape: as in PyTorch: outputs first.
        kind: how it is stored.
        data: uint8 `[rows, bytes of a row]`, a view of the file; a vector is one row.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray


class GgufFile:
    """A file that is mapped, not read.

    Attributes:
        metadata: values by their keys; of an array of strings only its length.
        tensors: by their names.

    Raises:
        UserError: it is no GGUF file, of another version, or ends too early.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"There is no file {path}.")
        if self.path.stat().st_size < 24:
            raise UserError(f"{path} is damaged: it does not begin as a GGUF file does.")
        # Private pages, so that the tensors may be written to as PyTorch expects; nobody does.
        self._bytes = np.memmap(path, np.uint8, "c")
        self._view = self._bytes.data
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, LookupError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is damaged: its metadata cannot be read. Fetch it again.") from error

    @property
    def architecture(self) -> str:
        """What the file calls its model's architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of this architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def require(self, key: str) -> Any:
        """As `get`, for a key that must be there.

        Raises:
            UserError: it is not.
        """
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.path} has no {self.architecture}.{key} in its metadata.")
        return value

    def _read(self) -> None:
        if bytes(self._view[:4]) != b"GGUF":
            raise UserError(f"{self.path} is damaged: it does not begin as a GGUF file does.")
        version, tensors, values = struct.unpack_from("<IQQ", self._view, 4)
        if version not in _VERSIONS:
            raise UserError(f"{self.path} is of GGUF version {version}: expected 2 or 3, little-endian.")
        self._place = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._string()
            self.metadata[key] = self._value(self._plain("I"))
        records = [self._record() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise IndexError
        start = -(-self._place // alignment) * alignment
        self.tensors = {record[0]: self._tensor(start, *record) for record in records}

    def _plain(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._view, self._place)
        self._place += struct.calcsize(f"<{code}")
        return value

    def _skip_string(self) -> tuple[int, int]:
        length = self._plain("Q")
        begin, self._place = self._place, self._place + length
        if self._place > len(self._view):
            raise IndexError
        return begin, self._place

    def _string(self) -> str:
        begin, end = self._skip_string()
        return bytes(self._view[begin:end]).decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._plain(_PLAIN[kind])
        inner, count = self._plain("I"), self._plain("Q")
        if inner in _PLAIN:
            values = struct.unpack_from(f"<{count}{_PLAIN[inner]}", self._view, self._place)
            self._place += count * struct.calcsize(f"<{_PLAIN[inner]}")
            return list(values)
        if inner != _STRING:
            raise KeyError(inner)  # arrays of arrays are allowed, but nobody writes them
        for _ in range(count):
            self._skip_string()
        return count

    def _record(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._plain("I")
        if dimensions > _MOST_DIMENSIONS:
            raise IndexError
        shape = tuple(self._plain("Q") for _ in range(dimensions))[::-1]
        return name, shape, self._plain("I"), self._plain("Q")

    def _tensor(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        try:
            known = GGMLQuantizationType(kind)
        except ValueError as error:
            raise UserError(f"{self.path}: tensor {name} is of the unknown type {kind}.") from error
        per_block, size = GGML_QUANT_SIZES[known]
        columns = shape[-1] if shape else 1
        if not all(shape):
            raise IndexError
        if columns % per_block:
            raise UserError(
                f"{self.path}: tensor {name} has {columns} columns, {known.name} has blocks of {per_block}."
            )
        row = columns // per_block * size
        begin = start + offset
        end = begin + row * math.prod(shape[:-1])
        if end > len(self._view):
            place = f"tensor {name} ends at byte {end}, the file at {len(self._view)}"
            raise UserError(f"{self.path} is damaged: {place}. Fetch it again.")
        return Tensor(name, shape, known, self._bytes[begin:end].view(np.ndarray).reshape(-1, row))
