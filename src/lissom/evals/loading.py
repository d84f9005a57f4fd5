"""How long it takes until a checkpoint can be used."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lissom.kernels.packed_layers  # noqa: F401 - what quantised checkpoints need
from lissom.devices.meters import in_fresh_process, interleaved

Seconds = dict[str, float]


def loading_times(
    folders: Mapping[str, Path], repeats: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, list[Seconds]]:
    """`repeats` times `time_loading` of each folder, by name, interleaved, each in a fresh process.

    A first round is not counted: after it all files are in the page cache.
    """
    found: dict[str, list[Seconds]] = {name: [] for name in folders}
    turns = {
        name: partial(in_fresh_process, "lissom.evals.loading:time_loading", str(path))
        for name, path in folders.items()
    }
    total = len(turns) * (1 + repeats)
    for done, (name, (seconds, _)) in enumerate(interleaved(turns, 1 + repeats)):
        found[name].append(seconds)
        progress(done + 1, total)
    return {name: seconds[1:] for name, seconds in found.items()}


@torch.no_grad()
def time_loading(folder: str) -> Seconds:
    """Seconds of `from_pretrained` (`load`), and of it with the first forward pass, of one token (`use`).

    The second one counts the pages of a mapped file that are read only when they are needed. What Python imports on
    the way is imported before.
    """
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = time.perf_counter()
    model(torch.ones(1, 1, dtype=torch.long))
    return {"load": loaded - start, "use": time.perf_counter() - start}
