"""The process in which one runtime is measured: commands in, figures out, one line of JSON each.

This file is run as a script by the Python that has the runtime, which may have neither lissom nor PyTorch: it needs the
standard library alone, and so does `load_runtime`'s module apart from its runtime.

A runtime's module has a class `Runtime(settings)` with

* `generate(ids, capacity, emit)`: read the token ids from an empty state, call `emit(token)` for the next one and for
  every further one, drawn greedily one by one, until `emit` raises; `capacity` is the most tokens there will be;
* `facts`: what is worth reporting, such as its version;

and, where it needs files of its own, a function `prepare(settings)` that makes them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO


class _Ended(Exception):
    """Unwinds a runtime's `generate`: something else is wanted."""


def load_runtime(path: str) -> Any:
    """The module in the file `path`, whose name may be that of the very package it measures."""
    spec = importlib.util.spec_from_file_location(f"runtime_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    from importlib import metadata  # not above: what is imported there counts in every runtime's peak

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def peak_bytes() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


class Session:
    """Answers commands until there are no more.

    While tokens are generated, control lies in the runtime; it comes back with each token, and the next command is
    taken from within `_emit`: so a runtime's own loop can be held, measured in parts, and dropped.
    """

    def __init__(self, commands: TextIO, replies: TextIO) -> None:
        self._commands, self._replies = commands, replies
        self._runtime: Any = None
        self._waiting: dict[str, Any] | None = None
        self._tokens: list[int] = []
        self._seconds: list[float] = []
        self._wanted = 0
        self._clock = 0.0

    def run(self) -> None:
        while (command := self._waiting or self._next()) is not None:
            self._waiting = None
            try:
                self._obey(command)
            except _Ended:
                continue
            except ImportError as error:
                self._reply({"error": str(error), "missing": error.name or ""})
            except Exception as error:
                words = str(error).strip().splitlines() or [type(error).__name__]
                self._reply({"error": words[0][:300]})

    def _next(self) -> dict[str, Any] | None:
        line = self._commands.readline()
        return json.loads(line) if line.strip() else None

    def _reply(self, facts: dict[str, Any]) -> None:
        self._replies.write(json.dumps(facts) + "\n")
        self._replies.flush()

    def _obey(self, command: dict[str, Any]) -> None:
        if command["do"] == "versions":
            self._reply({"versions": {package: version_of(package) for package in command["packages"]}})
        elif command["do"] == "prepare":
            load_runtime(command["runtime"]).prepare(command["settings"])
            self._reply({})
        elif command["do"] == "open":
            self._runtime = load_runtime(command["runtime"]).Runtime(command["settings"])
            self._reply({"facts": self._runtime.facts, "peak": peak_bytes()})
        elif command["do"] == "read":
            self._begin(1)
            self._runtime.generate(command["ids"], command["capacity"], self._emit)
            raise RuntimeError("it ended before it was asked to")
        else:
            raise RuntimeError(f"nothing is being read, so there is no {command['do']!r}")

    def _begin(self, wanted: int) -> None:
        self._tokens, self._seconds, self._wanted = [], [], wanted
        self._clock = time.perf_counter()

    def _emit(self, token: int) -> None:
        now = time.perf_counter()
        self._tokens.append(int(token))
        self._seconds.append(now - self._clock)
        self._clock = now
        if len(self._tokens) < self._wanted:
            return
        self._reply({"seconds": self._seconds, "tokens": self._tokens, "peak": peak_bytes()})
        command = self._next()
        if command is None or command["do"] != "step":
            self._waiting = command
            raise _Ended
        self._begin(command["count"])


def main() -> None:
    del sys.path[0]  # this file's folder: its modules are called like packages
    # Libraries print; what they print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    Session(sys.stdin, replies).run()


if __name__ == "__main__":
    main()
