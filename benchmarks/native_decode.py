"""Native decode against what one would use instead: decoding behind 512 and 8192 tokens, the time to the first token,
and a model of a billion parameters beside the memory's bandwidth.

A killed run goes on behind the last part that was measured, unless lissom was changed since. Runtimes that another
Python has are used where LISSOM_LLAMA_CPP_PYTHON, LISSOM_OPENVINO_PYTHON or LISSOM_ONNXRUNTIME_PYTHON names it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import lissom
from lissom.cli.bench import numbers
from lissom.cli.common import bars
from lissom.devices.machine import describe, measure_bandwidth
from lissom.devices.meters import threads
from lissom.evals.journal import Journal
from lissom.evals.peers import ARMS, OURS, Comparison, Size, compare, summarise
from lissom.evals.random_model import random_llama
from lissom.evals.stats import median_interval
from lissom.report.peers import result, rows, tables
from lissom.report.rows import Result, Row

MODEL = "smollm2-135m"
GENERATE, INT8, COMPACTED = "lissom generate()", "lissom int8 activations", "lissom cache ÷ 10"
INTERPRETERS = ("transformers fp32", "torch.compile")  # left out where a round of them would take minutes


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
        name: first word of its rows.
        arms: by their labels.
        layers: of the random model; 0 is `MODEL`.
        bandwidth: whether the memory's bandwidth is measured around it.
    """

    name: str
    context: int
    threads: int
    arms: tuple[str, ...]
    size: Size
    layers: int = 0
    bandwidth: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}, context {self.context}, {self.threads} threads"


def parts(quick: bool, counts: Sequence[int]) -> list[Part]:
    """What is measured, short work first."""
    most = max(counts)
    if quick:
        size = Size(reads=1, rounds=2, tokens=16)
        return [
            Part("decode", 128, most, (OURS, GENERATE, COMPACTED, "llama.cpp"), size),
            Part("first token", 128, most, (OURS, INT8, "transformers bf16"), Size(reads=2, rounds=0)),
            Part("billion", 64, most, (OURS, INT8, "llama.cpp"), size, layers=2, bandwidth=True),
        ]
    known = tuple(dict.fromkeys(arm.label for arm in ARMS))
    decode, long = Size(reads=3, rounds=9), Size(long_reads=1, rounds=7)
    return [
        *(Part("decode", 512, count, known, decode) for count in counts),
        *(Part("billion", 512, count, (OURS, INT8, "llama.cpp"), decode, 16, bandwidth=True) for count in counts),
        *(
            Part("first token", context, most, tuple(n for n in known if n not in (GENERATE, COMPACTED, *INTERPRETERS)),
                 Size(reads=5, long_reads=3, rounds=0))
            for context in (16, 128, 512, 2048, 8192)
        ),
        *(Part("decode", 8192, count, tuple(n for n in known if n not in INTERPRETERS), long) for count in counts),
    ]  # fmt: skip


def code() -> str:
    """Digest of lissom's files: what was measured of other code is measured again."""
    digest, root = hashlib.sha256(), Path(lissom.__file__).parent
    for file in sorted(root.rglob("*")):
        if file.suffix in (".py", ".so"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def measure(part: Part, progress) -> dict:
    """The comparison as plain values, with bytes per second read before and after it."""
    model = str(random_llama(part.layers)) if part.layers else MODEL
    speeds = [bandwidth(part.threads)] if part.bandwidth else []
    arms = tuple(arm for arm in ARMS if arm.label in part.arms)
    found = compare(model, (part.context,), (part.threads,), arms, part.size, progress)
    if part.bandwidth:
        speeds.append(bandwidth(part.threads))
    return {"comparison": found.to_dict(), "bandwidth": speeds}


def bandwidth(count: int) -> float:
    with threads(count):
        return measure_bandwidth() * 1e9


def bandwidth_rows(part: Part, comparison: Comparison, speeds: Sequence[float]) -> list[Row]:
    """The bandwidth, and which share of it lissom's steps reach with the weights that each of them reads."""
    if not speeds:
        return []
    top, where = max(speeds), f"{part.name}/threads {part.threads}/context {part.context}"
    found = [Row(f"{where}/read bandwidth", top, "bytes/s", low=min(speeds), high=top, n=len(speeds))]
    weights = {f.arm: f.facts["weight bytes"] for f in comparison.figures if "weight bytes" in f.facts}
    for value in summarise(comparison):
        if value.metric.name == "decode" and value.arm in weights:
            shares = [rate * weights[value.arm] / top for rate in value.rounds]
            own = median_interval(shares)
            name = f"{where}/{value.label}/share of the bandwidth"
            found.append(Row(name, own.estimate, "share", None, None, own.low, own.high, len(shares)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short contexts and a smaller model, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--threads", metavar="N,N", help="numbers of threads [default: 1 and all]")
    parser.add_argument("--journal", type=Path, default=Path("lissom-check/native-decode.jsonl"))
    given = parser.parse_args()
    counts = numbers("--threads", given.threads) if given.threads else sorted({1, torch.get_num_threads()})
    journal, now = Journal(given.journal), describe()
    base = [code(), now["machine"], now["versions"]]
    found: list[Row] = []
    facts: dict = {"runtimes": {}, "settings": {}, "failed": {}, "notes": []}
    shown = []
    with bars(Console(stderr=True)) as bar:
        wanted = parts(given.quick, counts)
        whole, task = bar.add_task("parts", total=len(wanted)), bar.add_task("", total=None)
        for part in wanted:
            identity = hashlib.sha256(json.dumps([base, asdict(part)], sort_keys=True).encode()).hexdigest()[:16]
            if identity not in journal:
                journal.add(
                    identity,
                    {"label": part.label}
                    | measure(
                        part,
                        lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
                    ),
                )
            record = journal[identity]
            comparison = Comparison.of_dict(record["comparison"])
            found += rows(comparison, f"{part.name}/") + bandwidth_rows(part, comparison, record["bandwidth"])
            told = result(comparison).facts
            facts["runtimes"] |= told["runtimes"]
            facts["settings"] |= {f"{part.name}/{name}": arm for name, arm in told["settings"].items()}
            facts["failed"] |= {f"{part.label}: {name}": why for name, why in told["failed"].items()}
            facts["notes"] += [note for note in told["notes"] if note not in facts["notes"]]
            shown += tables(comparison)
            bar.update(whole, advance=1)
    if given.json:
        Result("native-decode", found, facts=now | {"model": MODEL} | facts).write(given.json)
    if given.json != "-":
        out = Console()
        for table in shown:
            out.print(table)
        for row in found:
            if row.name.endswith("bandwidth"):
                value = f"{row.value / 1e9:.1f} GB/s" if row.unit == "bytes/s" else f"{row.value:.0%}"
                out.print(f"{row.name}: {value}", highlight=False)
        for name, reason in facts["failed"].items():
            out.print(f"Not measured: {name}: {reason}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
