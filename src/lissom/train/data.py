"""Text as windows of tokens: read file by file, tokenised once, and kept on disk where training takes it from."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.files import alone, atomic_path
from lissom.models.assets import cache_dir

Progress = Callable[[int, int], None]
_ENDINGS = (".txt", ".md", ".rst", ".jsonl")
_PIECE = 1 << 20  # characters that are read and tokenised at a time


class TokenWindows(Dataset):
    """Windows of equal length that do not overlap, of a stream of tokens.

    Attributes:
        tokens: of the stream, uint16 or uint32, perhaps mapped from a file.
        context: tokens of a window.
        first, count: windows of the stream that are in this dataset.
    """

    def __init__(self, tokens: np.ndarray, context: int, first: int = 0, count: int | None = None) -> None:
        self.tokens, self.context, self.first = tokens, context, first
        self.count = len(tokens) // context - first if count is None else count
        if self.count < 1:
            raise UserError(f"The text has {len(tokens)} tokens: less than a window of {context}.")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, int64 `[context]`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        start = (self.first + index) * self.context
        return {"input_ids": torch.from_numpy(self.tokens[start : start + self.context].astype(np.int64))}

    def split(self, share: float) -> tuple[TokenWindows, TokenWindows]:
        """This without the last `share` of its windows, and those."""
        held = max(1, round(share * self.count))
        if held >= self.count:
            raise UserError(f"The text has {self.count} windows of {self.context} tokens: none are left to train on.")
        kept = self.count - held
        return (
            TokenWindows(self.tokens, self.context, self.first, kept),
            TokenWindows(self.tokens, self.context, self.first + kept, held),
        )


def text_files(path: Path) -> list[Path]:
    """The text files of a folder and those below it, in the order of their names; or the file itself.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is no file, and no folder.")
    found = sorted(file for file in path.rglob("*") if file.suffix in _ENDINGS and file.is_file())
    if not found:
        raise UserError(f"{path} is a folder without {', '.join(_ENDINGS)} files.")
    return found


def documents(file: Path) -> Iterator[Iterator[str]]:
    """The text of a file, or of each line's `text` of a .jsonl file, in pieces that end where lines do. Each document
    must be read before the next one is asked for: no more than a piece of a file is in memory.

    Raises:
        UserError: it is no text, or a line has none.
    """
    with file.open(encoding="utf-8-sig") as stream:
        if file.suffix != ".jsonl":
            yield _pieces(stream, file)
            return
        for number, line in enumerate(_decoded(stream, file), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(f'{file}, line {number}: expected an object with a string as "text".')
            yield _pieces(io.StringIO(text), file)


def _pieces(stream: TextIO, file: Path) -> Iterator[str]:
    return _decoded(iter(lambda: stream.read(_PIECE) + stream.readline(), ""), file)


def _decoded(parts: Iterator[str], file: Path) -> Iterator[str]:
    try:
        yield from parts
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text file in UTF-8.") from error


def text_fingerprint(path: Path) -> str:
    """Tells other text from the same at another place: a digest of names below `path` and of what is in the files."""
    digest = hashlib.sha256()
    for file in text_files(path):
        with file.open("rb") as content:
            inside = hashlib.file_digest(content, "sha256").hexdigest()
        digest.update(f"{file.relative_to(path) if file != path else file.name} {inside}\n".encode())
    return digest.hexdigest()[:24]


def token_windows(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    progress: Progress = lambda done, total: None,
) -> TokenWindows:
    """The text at `path` as windows of `context` tokens. Documents follow each other, with the end-of-sequence token
    between them where the tokenizer has one.

    It is tokenised once, into lissom's cache; the next run with the same text and tokenizer takes it from there.

    Args:
        path: a text file, or a folder of .txt, .md, .rst and .jsonl files (`{"text": ...}` in each line).
        progress: called with (files done, files).

    Raises:
        UserError: there is no text, or less than a window of it.
    """
    files = text_files(Path(path))
    wide = len(tokenizer) > np.iinfo(np.uint16).max
    dtype = np.dtype(np.uint32 if wide else np.uint16)
    target = cache_dir() / "tokens" / f"{_identity(Path(path), tokenizer)}.bin"
    if not target.exists():
        _tokenise(files, tokenizer, dtype, target, progress)
    if target.stat().st_size < context * dtype.itemsize:
        raise UserError(
            f"{path} has {target.stat().st_size // dtype.itemsize} tokens: less than a window of {context}."
        )
    return TokenWindows(np.memmap(target, dtype, "r"), context)


def _tokenise(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any], target: Path, progress: Progress
) -> None:
    """Write the tokens of all files; of several processes one does."""
    with alone(target.with_suffix(".lock")):
        if target.exists():
            return
        with atomic_path(target) as temporary, temporary.open("wb") as out:
            for number, file in enumerate(files):
                progress(number, len(files))
                for document in documents(file):
                    for piece in document:
                        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                        out.write(np.asarray(ids, dtype).tobytes())
                    if tokenizer.eos_token_id is not None:
                        out.write(np.asarray([tokenizer.eos_token_id], dtype).tobytes())
        progress(len(files), len(files))


def _identity(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text_fingerprint(path)} {rules} {tokenizer.eos_token_id}".encode()).hexdigest()[:24]
