"""Tensors in a safetensors file of a named kind, with a digest: what is read is what was written."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lissom.errors import UserError
from lissom.files import atomic_path


@dataclass(frozen=True)
class Sealed:
    """A kind of file.

    Attributes:
        kind: name of the format.
        version: that is written, and the only one that is read.
        words: what such a file is called in messages.
        remedy: what is done where it is damaged.
    """

    kind: str
    version: int
    words: str
    remedy: str

    def save(self, path: str | Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Write a file, atomically.

        Args:
            header: what JSON can hold.
        """
        text = json.dumps({"version": self.version, **header})
        metadata = {"format": self.kind, "lissom": text, "sha256": _digest(text, tensors)}
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with atomic_path(path) as temporary:
            save_file(whole, temporary, metadata=metadata)

    def load(self, path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The header and the tensors of a file.

        Raises:
            UserError: there is no such file, it is damaged, or of another kind or version.
        """
        if not Path(path).is_file():
            raise UserError(f"There is no {self.words} {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != self.kind:
                    raise UserError(f"{path} is a safetensors file, but no {self.words} of lissom.")
                header: dict[str, Any] = json.loads(metadata["lissom"])
                if header["version"] != self.version:
                    raise UserError(f"{path} has format version {header['version']}; this lissom reads {self.version}.")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if metadata["sha256"] != _digest(metadata["lissom"], tensors):
                    raise UserError(f"{path} is damaged: it is not what was written. {self.remedy}")
                return header, tensors
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path} is no readable {self.words} ({error}). {self.remedy}") from error


def _digest(header: str, tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of everything that a file holds."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
