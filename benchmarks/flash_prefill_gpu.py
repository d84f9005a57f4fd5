"""FlashPrefill's Triton kernels on a GPU, beside PyTorch's SDPA and beside themselves with all blocks.

One layer of 32 query and 8 KV heads of size 128 in bf16, with made-up queries and keys; see `planted`. SDPA is the
faster of its FlashAttention and its cuDNN backend.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lissom.attention.flash_prefill import sparse_prefill
from lissom.attention.flash_prefill.crossover import planted
from lissom.devices.machine import describe
from lissom.kernels.blocks import Rules
from lissom.report.rows import Result, Row

SHAPE = (32, 8, 128)
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
ARMS: dict[str, dict[str, Any]] = {
    "all blocks": {"alpha": 0.0},
    "flashprefill": {"alpha": 0.1},
    "row-normalised": {"alpha": 0.1, "rules": Rules("row-normalised")},
    "flashprefill corrected": {"alpha": 0.1, "rules": Rules(corrected=True)},
    "forced": {"alpha": 2.0, "rules": Rules(last=0)},
}


def milliseconds(work: Callable[[], Any]) -> list[float]:
    """Median, and the quantiles that 95 % lie between."""
    from triton.testing import do_bench

    return do_bench(work, warmup=50, rep=300, quantiles=[0.5, 0.025, 0.975])  # type: ignore[no-any-return]


@torch.no_grad()
def measure(entries: int) -> list[Row]:
    from lissom.kernels import sparse_attention_triton as kernels

    query, key, value = (part.bfloat16() for part in planted(entries, *SHAPE, device="cuda"))
    scale, layout = SHAPE[2] ** -0.5, Rules().layout(entries, entries, SHAPE[0] // SHAPE[1])

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    dense = min(milliseconds(partial(sdpa, backend)) for backend in BACKENDS)
    rows = [_row(f"{entries}/SDPA", dense, dense)]
    wanted = sdpa(BACKENDS[0]).float()
    for name, settings in ARMS.items():
        found = sparse_prefill(query, key, value, **settings)
        away = float((found.output.float() - wanted).norm() / wanted.norm())
        rows += [
            _row(f"{entries}/{name}", milliseconds(partial(sparse_prefill, query, key, value, **settings)), dense),
            Row(f"{entries}/{name}/density", layout.density(found.selected[0]), "share", 1.0),
            Row(f"{entries}/{name}/away from SDPA", away, "share", 0.0),
        ]
    alpha = torch.full((SHAPE[0],), 0.1, device="cuda")

    def choose() -> None:
        kernels.choose(query[0], kernels.block_means(key[0], layout), layout, scale, alpha)

    choosing = milliseconds(choose)
    rows.append(Row(f"{entries}/flashprefill/choosing", choosing[0], "ms", None, None, *choosing[1:]))
    return rows


def _row(name: str, spent: list[float], base: list[float]) -> Row:
    return Row(f"{name}/attention of a layer", spent[0], "ms", base[0], base[0] / spent[0], *spent[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two lengths")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("flash_prefill_gpu: there is no GPU that PyTorch sees.")
    rows = []
    for entries in LENGTHS[:2] if given.quick else LENGTHS:
        for row in measure(entries):
            rows.append(row)
            if given.json != "-":
                print(
                    f"{row.name}: {row.value:.4g} {row.unit}" + (f" ({row.ratio:.2f}x)" if row.ratio else ""),
                    flush=True,
                )
    facts = describe(gpu=True)
    if given.json:
        Result("flash-prefill-gpu", rows, facts=facts).write(given.json)


if __name__ == "__main__":
    main()
