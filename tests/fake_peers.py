"""Runtimes that compute nothing, and packages with nothing in them, so that they can come, go and change in a test."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import gguf_files
import pytest
from gguf_files import Kind

from lissom.evals.peers import Arm, kept, process

COUNTING = (
    "class Runtime:\n    facts = {'made': 'here'}\n"
    "    def __init__(self, settings):\n        print('noise')\n"
    "    def generate(self, ids, capacity, emit):\n"
    "        for number in range(capacity - len(ids)):\n            emit(number)\n"
)
REFUSING = "class Runtime:\n    def __init__(self, settings):\n        raise ValueError('not this model')\n"


class FakePeers:
    """A folder of runtimes that takes the place of the real ones."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch
        (folder / "runtimes").mkdir(parents=True)
        shutil.copy(Path(process.__file__).parent / "worker.py", folder)
        monkeypatch.setattr(process, "_HERE", folder)

    def runtime(self, name: str, code: str) -> Arm:
        """Write a runtime, or write it anew: an arm that needs the package of its name."""
        (self._folder / "runtimes" / f"{name}.py").write_text(code)
        return Arm(name, name, "model", packages=(name,))

    def install(self, runtime: str, version: str, where: str = "python") -> str:
        """Have a Python of its own run a runtime whose package has this version there."""
        python, packages = self._folder / where, self._folder / f"{where}-packages"
        shutil.rmtree(packages / runtime, ignore_errors=True)
        about = packages / runtime / f"{runtime}-{version}.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: {runtime}\nVersion: {version}\n")
        path = os.pathsep.join(map(str, packages.iterdir()))
        python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self._monkeypatch.setenv(process.variable_of(runtime), str(python))
        kept._versions.cache_clear()  # as in the next run
        return str(python)


def tiny_file(folder: Path) -> str:
    """A tiny model as a file that every runtime computes exactly."""
    return str(gguf_files.write(folder / "model.gguf", gguf_files.model_of("llama"), Kind.F32, "llama"))
