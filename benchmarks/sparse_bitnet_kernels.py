"""Ternary products and decoding of 2:4 weights, beside dense ternary ones, 4 bits, and PyTorch's own products.

A product is of one vector, or of 256 as in a prompt, with a matrix that fits into a cache or does not. Decoding is
of models with random weights, for no kernel's time depends on them: about 100 million parameters, and a billion.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import lissom
from lissom.devices.machine import describe
from lissom.devices.meters import interleaved, threads
from lissom.evals.random_model import random_matrix, random_packed
from lissom.evals.stats import median_interval, ratio_interval
from lissom.kernels import native
from lissom.kernels.packed import GROUP, Packed
from lissom.kernels.ternary import TERNARY, TERNARY_2_4
from lissom.report.rows import Result, Row

SHAPES = {"in L2": (1536, 2304), "in L3": (4096, 4608), "in memory": (65536, 4608)}
OURS = {"2:4": TERNARY_2_4, "ternary": TERNARY, "int4": "q4"}
BASE = "ternary"  # what ratios are against
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
_LEAST = 0.005  # seconds that are timed at a time


def seconds_of(work: Callable[[], object]) -> float:
    """Of one call, over as many as take some milliseconds."""
    begun = time.perf_counter()
    work()
    count = max(1, int(_LEAST / max(time.perf_counter() - begun, 1e-7)))
    begun = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - begun) / count


def rounds_of(arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after one that does not count."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in interleaved({name: partial(seconds_of, work) for name, work in arms.items()}, 1):
        pass
    for name, seconds in interleaved({name: partial(seconds_of, work) for name, work in arms.items()}, rounds):
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


def decoding(config: LlamaConfig, format: str, context: int = 64) -> Callable[[], object]:
    """A step of a model with random weights of `format`, behind a prompt."""
    model = random_packed(config, format)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    assert isinstance(model, LlamaForCausalLM)
    block = lissom.NativeDecode()(model.eval())
    block.__enter__()  # for the rest of the process
    cache, token = DynamicCache(config=config), torch.tensor([[5]])
    model(torch.arange(context)[None], past_key_values=cache)

    def step() -> None:
        model(token, past_key_values=cache)
        cache.crop(context)

    return step


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
    rounds, counts = (5, [1]) if given.quick else (15, sorted({1, torch.get_num_threads()}))
    rows: list[Row] = []
    for where, (outputs, inputs) in list(SHAPES.items())[: 1 if given.quick else None]:
        for vectors in (1, 256):
            arms = products(outputs, inputs, vectors)
            for count in counts:
                with threads(count):
                    name = f"product/{outputs}x{inputs} {where}/{vectors}/{count} threads"
                    rows += rows_of(name, rounds_of(arms, rounds if vectors == 1 else 5))
    for size, config in {} if given.quick else MODELS.items():
        arms = {name: decoding(config, format) for name, format in OURS.items()}
        for count in counts:
            with threads(count):
                rows += rows_of(f"decode/{size}/{count} threads", rounds_of(arms, rounds))
    result = Result("sparse-bitnet-kernels", rows, facts=describe())
    if given.json:
        result.write(given.json)
    if given.json != "-":
        for row in rows:
            print(f"{row.name:58} {row.value * 1e6:10.1f} us {row.ratio:6.2f}x [{row.low:.2f}, {row.high:.2f}]")


if __name__ == "__main__":
    main()
