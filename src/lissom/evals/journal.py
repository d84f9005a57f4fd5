"""Measurements kept one by one, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lissom.devices.machine import describe
from lissom.errors import UserError
from lissom.models import fingerprint


class Journal:
    """Records by identity in a JSON-lines file. Each is appended as soon as it is measured.

    A line that a killed run left half written is passed over; its measurement is made again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        try:
            lines = path.read_text().splitlines() if path.exists() else []
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no journal of measurements; remove it or name another.") from error
        for line in lines:
            try:
                record = json.loads(line)
                self.records[record["identity"]] = record
            except (json.JSONDecodeError, KeyError, TypeError):
                continue

    def __contains__(self, identity: str) -> bool:
        return identity in self.records

    def __getitem__(self, identity: str) -> dict[str, Any]:
        return self.records[identity]

    def add(self, identity: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep a record on disk, and return it as a later run will read it."""
        text = json.dumps({"identity": identity, **record})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" + text)  # the line feed first: it ends a line that a killed run left half written
        except OSError as error:
            raise UserError(f"Cannot write {self.path}: {error.strerror}.") from error
        self.records[identity] = json.loads(text)
        return self.records[identity]


def scope(model: PreTrainedModel, *settings: object) -> str:
    """What a measurement depends on beside its arm: model, machine, versions, and the `settings` of the study."""
    here = describe()
    runtime = (str(model.dtype), here["machine"]["cpu"], here["machine"]["threads"], here["versions"])
    return digest(fingerprint(model), settings, runtime)


def scope_of(*settings: object) -> str:
    """The same without a model: machine, versions and `settings`."""
    here = describe()
    return digest(settings, here["machine"]["cpu"], here["machine"]["threads"], here["versions"])


def digest(*facts: object) -> str:
    """Of settings, for names and identities of what no machine changes."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
