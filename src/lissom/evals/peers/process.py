"""A runtime in a process of its own, as the measuring process sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_PATIENCE = 3600  # seconds for one answer: a long prompt on one thread, a compilation


class Failed(Exception):
    """A runtime cannot be measured; says why in a line."""


class OutOfTime(Failed):
    """It might be measured if there were more time."""


def python_of(runtime: str) -> str:
    """The Python that runs a runtime: this one, or the one that `LISSOM_<RUNTIME>_PYTHON` names."""
    return os.environ.get(variable_of(runtime)) or sys.executable


def variable_of(runtime: str) -> str:
    """Name of the environment variable that names the Python that has a runtime."""
    return f"LISSOM_{runtime.upper()}_PYTHON"


class Worker:
    """A process that holds one runtime with one model.

    Attributes:
        facts: what the runtime says about itself.
        deadline: time of `time.monotonic` at which the process is ended if an answer is still waited for.
    """

    def __init__(self, runtime: str, threads: int, deadline: float = float("inf")) -> None:
        """
        Args:
            runtime: a module of `lissom.evals.peers.runtimes`.
            threads: that libraries may use.
            deadline: see above.

        Raises:
            Failed: its Python cannot be run.
        """
        self._runtime, self.facts, self.deadline = runtime, dict[str, Any](), deadline
        count = str(threads)
        environment = os.environ | {name: count for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        try:
            self._process = subprocess.Popen(
                [python_of(runtime), str(_HERE / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                start_new_session=True,  # so that what it starts itself ends with it
            )
        except OSError as error:
            raise Failed(f"{variable_of(runtime)}={python_of(runtime)} cannot be run: {error.strerror}") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command of `worker` and wait for its answer.

        Raises:
            Failed: it could not be done, or the process ended.
            OutOfTime: it was not done in time.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._process.stdin.closed:
            raise Failed("the process was ended")
        timer = threading.Timer(max(0.0, min(_PATIENCE, self.deadline - time.monotonic())), self._kill)
        timer.start()
        try:
            self._process.stdin.write((json.dumps({"do": do, **arguments}) + "\n").encode())
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line and time.monotonic() >= self.deadline:
            raise OutOfTime("there was no time for it")
        if not line:
            raise Failed(f"the process ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            where = f"name a Python that has it in {variable_of(self._runtime)}"
            raise Failed(f"{answer['error']} in {python_of(self._runtime)}; {where}")
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def open(self, settings: dict[str, Any]) -> None:
        """Load the runtime and its model."""
        self.facts = self.ask("open", runtime=self._module, settings=settings)["facts"]

    def prepare(self, settings: dict[str, Any]) -> None:
        """Make the files that the runtime needs."""
        self.ask("prepare", runtime=self._module, settings=settings)

    @property
    def _module(self) -> str:
        return str(_HERE / "runtimes" / f"{self._runtime}.py")

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {code}"

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process and all that it started."""
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with suppress(BrokenPipeError):  # what was still to be written is not wanted any more
                    stream.close()
