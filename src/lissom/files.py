"""Writing that is never half done."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lissom.errors import UserError

# What PyTorch's archives and tokenizers say, in errors of no class of their own.
_UNWRITTEN = re.compile(
    r"inline_container|PytorchStreamWriter|^File too large|^No space left|^Disk quota|\(os error \d+\)"
)


def require_writable(path: str | Path) -> None:
    """Raise a `UserError` now where `atomic_path` could not write to `path` after long work."""
    target = Path(path)
    if target.name in ("", ".", ".."):
        raise UserError(f"{target} names no file.")
    _refuse_special(target)
    for folder in (target.parent, *target.parent.parents):
        if folder.exists():
            try:
                tempfile.TemporaryDirectory(prefix=".lissom-", dir=folder).cleanup()
            except OSError as error:
                raise UserError(f"Cannot write to {folder}: {error.strerror or error}.") from error
            return


def require_new(path: str | Path) -> None:
    """Raise a `UserError` now where a folder cannot be written to `path`, or would take the place of something."""
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} is there already: give another folder.")
    require_writable(target)


@contextmanager
def alone(lock: Path, refusal: str | None = None) -> Iterator[None]:
    """One process at a time holds `lock`, a file of the cache; others wait, or with a `refusal` are told that.

    Raises:
        UserError: it cannot be made, or another process holds it and there is a `refusal`.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire(timeout=-1 if refusal is None else 0)
    except Timeout as error:
        raise UserError(str(refusal)) from error
    except OSError as error:
        raise UserError(
            f"Cannot write to {lock.parent}: {error.strerror or error}. Set LISSOM_CACHE to another folder."
        ) from error
    try:
        yield
    finally:
        held.release()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` when the block ends without an error.

    The caller writes a file or makes a directory at the yielded path. What it wrote is flushed to the disk before
    the rename, so that a crash at any moment leaves the old content or the new, never a part. A directory replaces
    an existing directory.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    target = Path(path)
    _refuse_special(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"Cannot write to {target.parent}: {error.strerror or error}.") from error
    temporary = scratch / target.name
    try:
        with writing(target):
            yield temporary
            _finish(temporary)
            if temporary.is_dir() and target.is_dir():
                target.rename(scratch / "replaced")
            temporary.replace(target)
            _sync_entry(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def writing(target: str | Path) -> Iterator[None]:
    """Raise a `UserError` where a full disk or the like ends the block, in which libraries write to `target`."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, OSError | SafetensorError) or _UNWRITTEN.search(str(error))):
            raise
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while serializing: ").split("\n")[0]
        raise UserError(f"Cannot write {target}: {reason.removesuffix('.')}.") from error


def move_into(target: Path, source: Path, last: str) -> None:
    """Move what is in the folder `source` to `target`, flushed to the disk; the file called `last` at the end.

    What is there already is replaced.
    """
    _finish(source)
    for file in sorted(source.iterdir(), key=lambda file: file.name == last):
        if (target / file.name).is_dir():
            shutil.rmtree(target / file.name)
        file.replace(target / file.name)
    source.rmdir()
    _sync_entry(target)


def _refuse_special(target: Path) -> None:
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise UserError(f"{target} is no regular file: it is not replaced.")


def write_json(facts: Any, target: str) -> None:
    """JSON to a file, atomically, or to standard output where `target` is '-'."""
    text = json.dumps(facts, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    with atomic_path(target) as temporary:
        temporary.write_text(text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finish(path: Path) -> None:
    """Flush a file, or a folder with what is in it, and let others read it: some writers make private files."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if entry.is_file():
            entry.chmod(0o666 & ~_umask())
        _sync_entry(entry)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
