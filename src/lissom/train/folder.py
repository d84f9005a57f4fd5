"""The folder of a run: what was asked for, the tokenizer that was learned, and whether the run may go on."""

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
from lissom.train.run import CHECKPOINTS
from lissom.train.scratch import new_tokenizer

RECORD, TOKENIZER = "train.json", "tokenizer"


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
        alone_in_it = alone(_lock(path, "run"), f"Another process is training in {path}.")
        with alone_in_it if is_first() else nullcontext():
            with alone(_lock(path, "open")):
                _check(path, facts)
                require_writable(path / RECORD)
                write_json(dict(facts), str(path / RECORD))
            yield cls(path, facts)

    def tokenizer(self, text: Path, vocabulary: int) -> PreTrainedTokenizerBase:
        """The run's own, learned from `text` where there is none yet."""
        folder = self.path / TOKENIZER
        with alone(_lock(self.path, "open")):
            if not folder.exists():
                learned = new_tokenizer((part for file in text_files(text) for part in documents(file)), vocabulary)
                with atomic_path(folder) as temporary:
                    learned.save_pretrained(temporary)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        return loaded

    def end(self, history: list[dict[str, float]]) -> None:
        """Write down what was logged: the run has ended."""
        write_json({**self.facts, "history": history}, str(self.path / RECORD))


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
    except ValueError as error:
        raise UserError(f"{record} is damaged: remove {path}, or give another folder.") from error
    if "history" in known:
        raise UserError(f"{path} holds a run that has ended; give another folder.")
    different = [name for name in facts if known.get(name) != facts[name]]
    if different and (path / CHECKPOINTS).exists():
        raise UserError(f"{path} holds a run of another {different[0]}: give another folder, or as in {record}.")
    if different:  # which has not begun to train
        shutil.rmtree(path / TOKENIZER, ignore_errors=True)


def _lock(path: Path, what: str) -> Path:
    """It lies in the cache: the folder itself may not be there yet."""
    return cache_dir() / "locks" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.{what}"
