"""The recommended recipe beside what a user would run instead, in the same run."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

import torch

from lissom.decode import NativeDecode
from lissom.devices.machine import fast_bf16
from lissom.evals.peers import ARMS, OURS, Arm, Comparison, Size, compare, identity, recommended, stands
from lissom.evals.peers.compare import Progress
from lissom.evolve.measure import Bench
from lissom.recipes import Recipe

QUICK = Size(reads=2, rounds=3, tokens=16)


def arms(bench: Bench, best: Recipe, quick: bool) -> list[Arm]:
    """What is compared, the quickest to load first: a time that is short falls on those that compile and convert.

    Without transformers' own loop in the checkpoint's dtype, which the search has measured: the untouched model.
    """
    plain = Recipe.of(NativeDecode(), model=best.model, weights="packed")
    ours = [] if best == bench.base else [recommended(best.model_dump())]
    if not (bench.packed and best == plain):
        ours += [arm for arm in ARMS if arm.name == OURS]
    untouched = str(bench.own_dtype).removeprefix("torch.")
    others = [
        arm
        for runtime in ("llama_cpp", "transformers", "openvino", "onnxruntime", "torch_compile")
        for arm in ARMS
        if arm.runtime == runtime and not (runtime == "transformers" and arm.settings["dtype"] == untouched)
    ]
    return ours + (_fewer(others) if quick else others)


def _fewer(others: list[Arm]) -> list[Arm]:
    """One setting of those that take long: torch.compile in the dtype that this processor multiplies faster."""
    dtype = "bfloat16" if fast_bf16() else "float32"
    return [
        arm
        for arm in others
        if arm.runtime != "transformers"
        and not (arm.runtime == "torch_compile" and arm.settings["dtype"] != dtype)
        and arm.name != "openvino int8"
    ]


def beside_peers(
    bench: Bench,
    best: Recipe,
    deadline: float,
    *,
    quick: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """`best` and the other runtimes that are installed, at the length of the bench's documents; see `evals.peers`.

    The bench's journal keeps the comparison, unless the time was too short for all of it. It is made again where a
    runtime has been installed or changed, or has come to run after it failed.
    """
    chosen, size = arms(bench, best, quick), QUICK if quick else Size()
    measure = partial(compare, bench.base.model, (bench.tokens,), (), progress=progress, deadline=deadline)
    key = bench.identity("peers", 0, best, [identity(chosen), asdict(size), torch.get_num_threads()])
    kept = Comparison.of_dict(bench.journal[key]) if key in bench.journal else None
    if kept and stands(kept, chosen, partial(measure, size=size.least)):
        return kept
    found = measure(chosen, size)
    if found.hurried:
        return kept or found
    return Comparison.of_dict(bench.journal.add(key, found.to_dict()))
