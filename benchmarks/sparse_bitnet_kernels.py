"""Products and decoding of 2:4 weights, beside dense ternary ones, 4 bits, PyTorch's own products and llama.cpp.

A product is of one vector, or of 256 as in a prompt, with a matrix that fits into a cache or does not. Decoding is of
models with random weights that have as many zeros as trained ones: about 100 million parameters, and a billion; each in
a process of its own. llama.cpp is found where LISSOM_LLAMA_CPP_PYTHON names a Python that has llama-cpp-python; without
it its arms are left out.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig

import lissom
from lissom.devices.machine import describe
from lissom.devices.meters import interleaved, threads
from lissom.evals.peers.process import Failed, Worker
from lissom.evals.random_model import random_matrix, random_packed
from lissom.evals.stats import Interval, median_interval, ratio_interval, verdict
from lissom.export.gguf import export_gguf
from lissom.kernels import native
from lissom.kernels.packed import GROUP, Packed
from lissom.kernels.ternary import TERNARY, TERNARY_2_4
from lissom.plugin import attach
from lissom.recipes import Recipe
from lissom.report.rows import Claim, Result, Row
from lissom.train import new_tokenizer

SHAPES = {"in L2": (1536, 2304), "in L3": (4096, 4608), "in memory": (65536, 4608)}
OURS = {"2:4": TERNARY_2_4, "ternary": TERNARY, "int4": "q4"}
BASE, FASTEST = "ternary", "2:4"  # what ratios are against, and what is claimed of
SOURCE = "lissom"
AGAINST_LLAMA_CPP = {"94M": 2.0, "1.2B": 1.25}
TORCH = {"torch fp32": torch.float32, "torch bf16": torch.bfloat16}
MODELS = {
    "94M": LlamaConfig(
        hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        head_dim=64, vocab_size=16384, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
    "1.2B": LlamaConfig(
        hidden_size=2304, intermediate_size=6144, num_hidden_layers=20, num_attention_heads=36, num_key_value_heads=12,
        head_dim=64, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
    ),
}  # fmt: skip
LLAMA_CPP = {"tq2_0": "llama.cpp TQ2_0", "tq1_0": "llama.cpp TQ1_0"}
ROUNDS = 15
STEPS = 16  # tokens that are decoded in a round
PROMPT = list(range(3, 67))
CAPACITY = len(PROMPT) + (ROUNDS + 2) * (STEPS + 1) + 8
_LEAST = 0.005  # seconds that are timed at a time


def counted(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call, over as many as take some milliseconds."""
    begun = time.perf_counter()
    work()
    count = max(1, int(_LEAST / max(time.perf_counter() - begun, 1e-7)))
    begun = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - begun) / count


def rounds_of(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number, (name, seconds) in enumerate(interleaved(arms, rounds + 1)):
        if number >= len(arms):
            found[name].append(seconds)
    return found


def product(packed: Packed, vectors: torch.Tensor) -> Callable[[], object]:
    """The native kernel alone, on activations of one byte; it keeps what it reads."""
    x = F.pad(vectors, (0, -packed.columns % GROUP)).contiguous()
    out, matrix = torch.empty(len(x), packed.rows), packed.matrix()
    numbers = ctypes.c_int64(len(x)), ctypes.c_int64(1)

    def work(kept: Packed = packed, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
        native.call("multiply", matrix, pointers[0], *numbers, pointers[1])

    return work


def products(rows: int, columns: int, vectors: int) -> dict[str, Callable[[], object]]:
    """Every arm's product of one shape."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(vectors, columns, generator=random)
    arms = {name: product(random_matrix(rows, columns, format, random), x) for name, format in OURS.items()}
    weight = torch.randn(rows, columns, generator=random)
    for name, dtype in TORCH.items():
        arms[name] = partial(F.linear, x.to(dtype), weight.to(dtype))
    return arms


@contextmanager
def decoding(config: LlamaConfig, count: int) -> Iterator[dict[str, Callable[[], float]]]:
    """Models of one size, each in a process of its own; a call decodes some tokens and returns the seconds of one.

    Vocabularies are padded: what a tokenizer learns from a few words is enough to write a GGUF file.
    """
    tokenizer = new_tokenizer(["speed does not depend on words"], 300)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def opened(name: str, runtime: str, **settings: Any) -> None:
            worker = stack.enter_context(Worker(runtime, count))
            try:
                worker.open({"threads": count, **settings})
            except Failed as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                return
            worker.ask("read", ids=PROMPT, capacity=CAPACITY)
            workers[name] = worker

        for name, format in OURS.items():
            target, model = Path(folder) / format, random_packed(config, format)
            attach(model)
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            if format == TERNARY:
                for type in LLAMA_CPP:
                    export_gguf(model, tokenizer, Path(folder) / f"{type}.gguf", type)
            opened(name, "lissom", recipe=Recipe.of(lissom.NativeDecode(), model="", dtype="float32").model_dump(),
                   model=str(target), through="loop")  # fmt: skip
        for type, shown in LLAMA_CPP.items():
            opened(shown, "llama_cpp", gguf=str(Path(folder) / f"{type}.gguf"), flash=True)

        def step(worker: Worker) -> float:
            seconds = worker.ask("step", count=STEPS + 1)["seconds"]
            return sum(seconds[1:]) / STEPS  # the first one pays for the pause before it

        yield {name: partial(step, worker) for name, worker in workers.items()}


def at_least(factor: float, found: dict[str, list[float]], other: str, where: str) -> Claim:
    """Whether 2:4 is so many times as fast as another arm."""
    ratio = ratio_interval(found[other], found[FASTEST])
    words = f"{where}: 2:4 is at least {factor}x as fast as {other}"
    words += f": {ratio.estimate:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
    return Claim(words, SOURCE, verdict([Interval(-ratio.estimate, -ratio.high, -ratio.low)], -factor))


def rows_of(where: str, found: dict[str, list[float]]) -> Iterator[Row]:
    for name, seconds in found.items():
        own, ratio = median_interval(seconds), ratio_interval(found[BASE], seconds)
        yield Row(f"{where}/{name}", own.estimate, "s", median_interval(found[BASE]).estimate, ratio.estimate,
                  ratio.low, ratio.high, len(seconds))  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one thread, one shape, no models; under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    if native.library() is None:
        sys.exit("This installation has no native kernels: there is nothing to measure.")
    rounds, counts = (5, [1]) if given.quick else (ROUNDS, sorted({1, torch.get_num_threads()}))
    rows: list[Row] = []
    claims: list[Claim] = []
    for where, (outputs, inputs) in list(SHAPES.items())[: 1 if given.quick else None]:
        for vectors in (1, 256):
            arms = {name: partial(seconds_of, work) for name, work in products(outputs, inputs, vectors).items()}
            for count in counts:
                with threads(count):
                    name = f"{outputs}x{inputs} {where}/{vectors}/{count} threads"
                    found = rounds_of(arms, rounds if vectors == 1 else 5)
                    rows += rows_of(f"product/{name}", found)
                    if vectors == 1:
                        claims.append(at_least(1.25, found, BASE, f"{outputs}x{inputs}, {where}, {counted(count)}"))
    for size, config in {} if given.quick else MODELS.items():
        for count in counts:
            with decoding(config, count) as steps:
                found = rounds_of(steps, rounds)
            rows += rows_of(f"decode/{size}/{count} threads", found)
            wanted = {BASE: 1.0, "int4": 1.0, LLAMA_CPP["tq2_0"]: AGAINST_LLAMA_CPP[size]}
            where = f"decoding {size} parameters, {counted(count)}"
            claims += [at_least(factor, found, other, where) for other, factor in wanted.items() if other in found]
    result = Result("sparse-bitnet-kernels", rows, claims, describe())
    if given.json:
        result.write(given.json)
    if given.json != "-":
        for row in rows:
            print(f"{row.name:58} {row.value * 1e6:10.1f} us {row.ratio:6.2f}x [{row.low:.2f}, {row.high:.2f}]")
        for claim in claims:
            print(f"{claim.verdict}: {claim.claim}")


if __name__ == "__main__":
    main()
