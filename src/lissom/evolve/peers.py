"""The recommended recipe beside what a user would run instead, in the same run."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch

from lissom.decode import NativeDecode
from lissom.devices.machine import describe
from lissom.evals.peers import ARMS, OURS, Arm, Comparison, Size, compare, recommended
from lissom.evals.peers.compare import Progress
from lissom.evals.peers.process import python_of
from lissom.evolve.measure import Bench
from lissom.recipes import Recipe

QUICK = Size(reads=2, rounds=3, tokens=16)
_PACKAGES = ("llama-cpp-python", "openvino", "optimum-intel", "onnxruntime-genai")


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
    fast = {"avx512_bf16", "amx_bf16"} & set(describe()["machine"]["flags"])
    dtype = "bfloat16" if fast else "float32"
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

    The bench's journal keeps the comparison, unless the time was too short for all of it.
    """
    chosen, size = arms(bench, best, quick), QUICK if quick else Size()
    facts = [
        *([asdict(arm) for arm in chosen], asdict(size), torch.get_num_threads()),
        {arm.runtime: python_of(arm.runtime) for arm in chosen},
        {package: _version(package) for package in _PACKAGES},
    ]
    identity = bench.identity("peers", 0, best, facts)
    if identity not in bench.journal:
        found = compare(bench.base.model, (bench.tokens,), (), chosen, size, progress, deadline)
        if found.hurried:
            return found
        bench.journal.add(identity, found.to_dict())
    return Comparison.of_dict(bench.journal[identity])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
