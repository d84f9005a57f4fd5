"""Many small trainings side by side, each kept as soon as it has ended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import torch

from lissom.evals.journal import Journal


def train_missing(
    jobs: Mapping[str, tuple[Any, ...]],
    trained: Callable[..., dict[str, Any]],
    known: Journal,
    progress: Callable[[int, int], None],
) -> None:
    """Run `trained(*arguments)` for each job that `known` has no record of, in processes of one thread each, which
    small models make better use of than one with all; on a GPU in one.

    Args:
        jobs: arguments by identity, in the order in which they begin.
        progress: called with (done, total).
    """
    missing = {identity: arguments for identity, arguments in jobs.items() if identity not in known}
    progress(len(jobs) - len(missing), len(jobs))
    if not missing:
        return
    workers = 1 if torch.accelerator.is_available() else torch.get_num_threads()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin)
    try:
        futures = {pool.submit(trained, *arguments): identity for identity, arguments in missing.items()}
        for number, future in enumerate(as_completed(futures), 1):
            known.add(futures[future], future.result())
            progress(len(jobs) - len(missing) + number, len(jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: the main process has the last
    torch.set_num_threads(1)
