"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Stoppable(Protocol):
    """A run that looks at `stopped` behind every step."""

    stopped: bool


@contextmanager
def interruptible(run: Stoppable, alone: bool) -> Iterator[None]:
    """Ctrl-C tells the run to stop, and pressed twice ends it at once.

    Not where the process is one of several (`alone` is false), which would not end at the same step, or where somebody
    else has a say in it.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not (alone and ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
        yield
        return

    def stop(*_: Any) -> None:
        if run.stopped:
            raise KeyboardInterrupt
        run.stopped = True

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
