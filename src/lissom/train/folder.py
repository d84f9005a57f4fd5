"""The folder of a run: what was asked for, the tokenizer that was learned, checkpoints, and whether it may go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.files import alone, atomic_path, require_writable, write_json
from lissom.models.assets import cache_dir
from lissom.train.data import documents, text_files
from lissom.train.scratch import new_tokenizer

RECORD, TOKENIZER, CHECKPOINTS = "train.json", "tokenizer", "checkpoints"
STATE = "trainer_state.json"  # of a checkpoint: what is written last


@dataclass(frozen=True)
class RunFolder:
    """A folder that is this run's. Processes that run it together may open it at the same time.

    Attributes:
        path: of the folder.
        facts: what was asked for, as JSON has it.
    """

    path: Path
    facts: Mapping[str, Any]

    @classmethod
    @contextmanager
    def open(cls, path: Path, facts: Mapping[str, Any]) -> Iterator[RunFolder]:
        """Make the folder, or go on with it, and keep others out of it as long as it is open.

        Raises:
            UserError: it holds something else, a run of other facts that has begun, or one that has ended; or another
                run is going on in it.
        """
        facts = json.loads(json.dumps(dict(facts)))  # as they will be read again
        alone_in_it = alone(_lock(path, "run"), f"Another process is training in {path}.")
        with alone_in_it if is_first() else nullcontext():
            with alone(_lock(path, "open")):
                _check(path, facts)
                require_writable(path / RECORD)
                write_json(facts, str(path / RECORD))
            yield cls(path, facts)

    def tokenizer(self, text: Path, vocabulary: int) -> PreTrainedTokenizerBase:
        """The run's own, learned from `text` where there is none yet."""
        folder = self.path / TOKENIZER
        with alone(_lock(self.path, "open")):
            if not folder.exists():
                learned = new_tokenizer(_pieces(text), vocabulary)
                with atomic_path(folder) as temporary:
                    learned.save_pretrained(temporary)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        return loaded

    def end(self, history: list[dict[str, float]]) -> None:
        """Write down what was logged: the run has ended."""
        write_json({**self.facts, "history": history}, str(self.path / RECORD))


def _pieces(text: Path) -> Iterator[str]:
    return (piece for file in text_files(text) for document in documents(file) for piece in document)


def last_checkpoint(path: Path) -> Path | None:
    """The last checkpoint of the run in `path` that was written to its end."""
    found = {step_of(folder): folder for folder in (path / CHECKPOINTS).glob("checkpoint-*")}
    for _, folder in sorted(item for item in found.items() if item[0] >= 0)[::-1]:
        try:
            json.loads((folder / STATE).read_text())
        except (OSError, ValueError):
            continue
        return folder
    return None


def step_of(checkpoint: Path) -> int:
    """Steps that a checkpoint has behind it; -1 where its name does not say."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def is_first() -> bool:
    """Whether this is the only process of the run, or the one of several that writes."""
    return os.environ.get("RANK", "0") == "0"


def _check(path: Path, facts: Mapping[str, Any]) -> None:
    record = path / RECORD
    if not record.exists():
        if path.exists() and any(path.iterdir()):
            raise UserError(f"{path} holds something that is no run of `lissom train`; give another folder.")
        return
    try:
        known = json.loads(record.read_text())
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(f"{record} is damaged: remove {path}, or give another folder.")
    if "history" in known:
        raise UserError(f"{path} holds a run that has ended; give another folder.")
    different = next(_different(known, facts), None)
    if different is not None and (path / CHECKPOINTS).exists():
        raise UserError(f"{path} holds a run with {different}: give another folder, or as in {record}.")
    if different is not None:  # which has not begun to train
        shutil.rmtree(path / TOKENIZER, ignore_errors=True)


def _different(known: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """What of `asked` is otherwise in `known`, in words."""
    for name, value in asked.items():
        own = known.get(name)
        if isinstance(own, dict) and isinstance(value, Mapping):
            yield from _different(own, value)
        elif own != value and isinstance(value, str | int | float | None) and isinstance(own, str | int | float | None):
            yield f"{name} {own} and not {value}"
        elif own != value:
            yield f"another {name}"


def _lock(path: Path, what: str) -> Path:
    """It lies in the cache: the folder itself may not be there yet."""
    return cache_dir() / "locks" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.{what}"
