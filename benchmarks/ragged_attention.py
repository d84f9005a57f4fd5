"""The native attention kernel of one decode step against the fastest SDPA on dense tensors of the same content."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lissom.devices.meters import interleaved
from lissom.kernels import native, ragged_attention
from lissom.report.rows import Result, Row

HEADS, GROUP, SIZE = 3, 3, 64  # SmolLM2-135M's layer


def problem(length: int, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    """The kernel and both ways of calling SDPA for grouped queries, on the same keys and values."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS * length, SIZE, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(1, HEADS * GROUP, 1, SIZE, generator=generator).to(dtype)
    starts, lengths = torch.arange(HEADS) * length, torch.full((HEADS,), length)
    dense_keys, dense_values = keys.view(1, HEADS, length, SIZE), values.view(1, HEADS, length, SIZE)

    def repeated() -> torch.Tensor:
        wide = (x.repeat_interleave(GROUP, 1) for x in (dense_keys, dense_values))
        return F.scaled_dot_product_attention(query, *wide)

    return {
        "native": lambda: ragged_attention(query, keys, values, None, starts, lengths, None, SIZE**-0.5),
        "sdpa": lambda: F.scaled_dot_product_attention(query, dense_keys, dense_values, enable_gqa=True),
        "sdpa, repeated heads": repeated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two lengths")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    rows = []
    for length in (512, 2048) if given.quick else (128, 512, 2048, 8192):
        for dtype in (torch.float32, torch.bfloat16):
            arms = problem(length, dtype)
            wanted = arms["sdpa"]().float()
            torch.testing.assert_close(arms["native"]().float(), wanted, atol=2e-2, rtol=2e-2)

            def timed(work: Callable[[], torch.Tensor]) -> float:
                start = time.perf_counter()
                for _ in range(20):
                    work()
                return (time.perf_counter() - start) / 20

            seconds: dict[str, list[float]] = {name: [] for name in arms}
            for name, value in interleaved({n: (lambda w=w: timed(w)) for n, w in arms.items()}, 15):
                seconds[name].append(value)
            ours = statistics.median(seconds["native"])
            base = min(statistics.median(seconds[name]) for name in arms if name != "native")
            name = f"{length} entries, {str(dtype).removeprefix('torch.')}"
            low, high = min(seconds["native"]), max(seconds["native"])
            rows.append(Row(name, ours, "s", base, base / ours, low, high, len(seconds["native"])))
            if given.json != "-":
                read = 2 * HEADS * length * SIZE * (4 if dtype == torch.float32 else 2) / ours / 1e9
                print(f"{name:24s} {ours * 1e6:8.0f} us   {base / ours:5.2f}x the best SDPA   {read:5.1f} GB/s")
    if given.json:
        Result(f"ragged-attention ({native.status().isa})", rows).write(given.json)


if __name__ == "__main__":
    main()
