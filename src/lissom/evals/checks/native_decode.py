"""Native decode beside what one would use instead: decoding behind short and long prompts, the time to the first token,
and a model of a billion parameters beside the memory's bandwidth."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

import lissom
from lissom.devices.machine import describe, measure_bandwidth
from lissom.devices.meters import threads
from lissom.evals.journal import Journal
from lissom.evals.peers import ARMS, OURS, Arm, Comparison, Size, compare, identity, stands
from lissom.evals.random_model import random_llama

GENERATE, INT8, COMPACTED = "lissom generate()", "lissom int8 activations", "lissom cache ÷ 10"
LLAMA_CPP, BF16 = "llama.cpp", "transformers bf16"
STAGES = ("parts", "within a part")
_ALL = tuple(dict.fromkeys(arm.label for arm in ARMS))
_FAST = tuple(dict.fromkeys(arm.label for arm in ARMS if not arm.slow))


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
        name: `decode`, `first token` or `billion`: the first word of its rows.
        context: tokens of the prompt.
        arms: by their labels.
        layers: of a random model; 0 is the model that is checked.
    """

    name: str
    context: int
    threads: int
    arms: tuple[str, ...]
    size: Size
    layers: int = 0

    @property
    def chosen(self) -> list[Arm]:
        """The arms of those labels."""
        return [arm for arm in ARMS if arm.label in self.arms]


def _decode(context: int, threads: int) -> Part:
    long = context > 4096
    size = Size(long_reads=1, rounds=7) if long else Size(reads=3, rounds=9)
    return Part("decode", context, threads, _FAST if long else _ALL, size)


def _first(context: int, threads: int) -> Part:
    arms = tuple(name for name in _FAST if name not in (GENERATE, COMPACTED))
    return Part("first token", context, threads, arms, Size(reads=5, long_reads=3, rounds=0))


def _billion(threads: int, layers: int = 16) -> Part:
    return Part("billion", 512, threads, (OURS, INT8, LLAMA_CPP), Size(reads=3, rounds=9), layers)


def quick(counts: Sequence[int]) -> list[Part]:
    """Under a minute: whether everything runs."""
    size, most = Size(reads=1, rounds=2, tokens=16), max(counts)
    return [
        Part("decode", 128, most, (OURS, GENERATE, COMPACTED, LLAMA_CPP), size),
        Part("first token", 128, most, (OURS, INT8, BF16), Size(reads=2, rounds=0)),
        Part("billion", 64, most, (OURS, INT8, LLAMA_CPP), size, layers=2),
    ]


def small(counts: Sequence[int]) -> list[Part]:
    """Minutes: one short and one middle context, no model of a billion parameters."""
    most = max(counts)
    return [*(_decode(512, count) for count in counts), *(_first(context, most) for context in (16, 512, 2048))]


def default(counts: Sequence[int]) -> list[Part]:
    """Everything, short work first."""
    most = max(counts)
    return [
        *(_decode(512, count) for count in counts),
        *(_billion(count) for count in counts),
        *(_first(context, most) for context in (16, 128, 512, 2048, 8192)),
        *(_decode(8192, count) for count in counts),
    ]


SIZES: dict[str, Callable[[Sequence[int]], list[Part]]] = {"quick": quick, "small": small, "default": default}


@dataclass(frozen=True)
class Measured:
    """A part, and what was measured: `bandwidth` in bytes per second, before and after a model of a billion."""

    part: Part
    comparison: Comparison
    bandwidth: list[float]


def run(
    model: str,
    size: str,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    counts: Sequence[int] = (),
) -> list[Measured]:
    """The parts of one of `SIZES`. A run that was stopped goes on behind its last whole part, unless lissom, the
    machine, or a version of what is measured has changed, or a runtime that failed has come to run.

    Args:
        progress: called with (stage, done, total); the stages are `STAGES`.
        counts: numbers of threads; default: 1 and all.
    """
    parts = SIZES[size](sorted(set(counts)) or sorted({1, torch.get_num_threads()}))
    known, now = Journal(journal), describe()
    scope = [model, _code(), now["machine"], now["versions"]]
    found = []
    for number, part in enumerate(parts):
        progress(STAGES[0], number, len(parts))
        facts = json.dumps([scope, identity(part.chosen), asdict(part)], sort_keys=True)
        key = hashlib.sha256(facts.encode()).hexdigest()[:16]
        measure = partial(_compare, model, part, partial(progress, STAGES[1]))
        kept = Comparison.of_dict(known[key]["comparison"]) if key in known else None
        if not (kept and stands(kept, part.chosen, partial(measure, part.size.least))):
            known.add(key, _measure(part, partial(measure, part.size)))
        record = known[key]
        found.append(Measured(part, Comparison.of_dict(record["comparison"]), record["bandwidth"]))
    progress(STAGES[0], len(parts), len(parts))
    return found


def _code() -> str:
    """Digest of lissom's files: what was measured of other code is measured again."""
    digest, root = hashlib.sha256(), Path(lissom.__file__).parent
    for file in sorted(root.rglob("*")):
        if file.suffix in (".py", ".so"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _measure(part: Part, measure: Callable[[Sequence[Arm]], Comparison]) -> dict:
    """A part as plain values."""
    speeds = [_bandwidth(part.threads)] if part.layers else []
    found = measure(part.chosen)
    speeds += [_bandwidth(part.threads)] if part.layers else []
    return {"comparison": found.to_dict(), "bandwidth": speeds}


def _compare(
    model: str, part: Part, progress: Callable[[int, int], None], size: Size, arms: Sequence[Arm]
) -> Comparison:
    name = str(random_llama(part.layers)) if part.layers else model
    return compare(name, (part.context,), (part.threads,), arms, size, lambda _, done, total: progress(done, total))


def _bandwidth(count: int) -> float:
    with threads(count):
        return measure_bandwidth() * 1e9
