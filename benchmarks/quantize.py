"""What low-bit weights cost: perplexity and bits of every method, on weights that lie on no grid beforehand.

The embedded model was stored in groups of 32 with 4 bits, so rounding it to such groups again would lose nothing. Here
each matrix first has its inputs permuted at random, or rotated by a random orthogonal matrix, with the activations
turned alike: the same function, in weights that no longer fit their old groups. A permutation keeps that some inputs
are much larger than others, a rotation does not.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

import lissom
from lissom.evals.perplexity import window_nll
from lissom.evals.stats import paired_bootstrap
from lissom.evals.texts import passages
from lissom.models import assets
from lissom.models.packed_layers import PackedLinear
from lissom.report.rows import Result, Row
from lissom.weights.quant import Quantize

ARMS = {
    "fp32": None,
    "8-bit rtn": Quantize(bits=8, method="rtn"),
    "4-bit symmetric rtn": Quantize(method="rtn", symmetric=True),
    "4-bit rtn": Quantize(method="rtn"),
    "4-bit symmetric search": Quantize(method="search", symmetric=True),
    "4-bit search": Quantize(method="search"),
    "4-bit symmetric gptq": Quantize(method="gptq", symmetric=True),
    "4-bit gptq, group 64": Quantize(method="gptq", group_size=64),
    "4-bit gptq": Quantize(method="gptq"),
    "4/8-bit symmetric gptq, 5 bits": Quantize(method="gptq", symmetric=True, target_bits=5.0),
}
QUICK = ("fp32", "8-bit rtn", "4-bit symmetric rtn", "4-bit rtn")
WINDOWS, TOKENS = 6, 512


class Turned(nn.Module):
    """A linear layer whose inputs are turned before a matrix that was turned the same way."""

    def __init__(self, linear: nn.Linear, turn: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.turn = linear, turn
        linear.weight = nn.Parameter(self._turned(linear.weight.detach()).contiguous(), requires_grad=False)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., self.turn] if self.turn.ndim == 1 else x @ self.turn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self._turned(x))


def off_grid(model: PreTrainedModel, kind: str) -> None:
    """Turn every matrix of the layers; one rotation for all matrices of a width, a permutation for each."""
    generator, rotations = torch.Generator().manual_seed(0), {}
    for name, module in list(model.model.layers.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        width = module.in_features
        if kind == "permuted":
            turn = torch.randperm(width, generator=generator)
        else:
            if width not in rotations:
                rotations[width] = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            turn = rotations[width]
        model.model.layers.set_submodule(name, Turned(module, turn))


def text(quick: bool) -> str:
    """Speeches of three centuries, or what needs no fetching."""
    if quick:
        return "\n".join(part for _, part in passages()[::8])
    return "\n".join(file.read_text() for file in sorted(assets.path("sotu").glob("*.txt"))[::36][:7])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rounding only, one window, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    arms = {name: ARMS[name] for name in QUICK} if given.quick else ARMS
    rows, table, own = [], Table(box=SIMPLE), np.zeros(0)
    for heading in ("weights", "method", "bits per weight", "perplexity", "ΔNLL [95 %]", "seconds"):
        table.add_column(heading, justify="left" if heading in ("weights", "method") else "right")
    todo: list[tuple[str, str, Any]] = [(k, n, m) for k in ("permuted", "rotated") for n, m in arms.items()]
    for kind, name, method in track(todo, "methods", console=Console(stderr=True)):
        model, tokenizer = lissom.load()
        off_grid(model, kind)
        started = time.perf_counter()
        if method is not None:
            method.convert(model, tokenizer)
        seconds = time.perf_counter() - started
        ids = tokenizer(text(given.quick), return_tensors="pt", verbose=False)["input_ids"][0]
        starts = torch.linspace(0, len(ids) - TOKENS, 1 if given.quick else WINDOWS).long()
        nll = np.concatenate([window_nll(model, ids[s : s + TOKENS], TOKENS, TOKENS // 2).numpy() for s in starts])
        own = nll if method is None else own
        layers = [m.packed for m in model.modules() if isinstance(m, PackedLinear)]
        layers = [packed for packed in layers if packed.rows != model.config.vocab_size]
        bits = 8 * sum(p.nbytes for p in layers) / sum(p.rows * p.columns for p in layers) if layers else 32.0
        # Tokens of a stretch of 32 are one unit: neighbours are not independent.
        units = [np.array([part.mean() for part in np.array_split(losses, len(own) // 32)]) for losses in (nll, own)]
        gap, perplexity, base = paired_bootstrap(*units), float(np.exp(nll.mean())), float(np.exp(own.mean()))
        label = f"{kind}/{name}"
        rows += [
            Row(f"{label}/perplexity", perplexity, "", base, base / perplexity, n=len(nll)),
            Row(f"{label}/NLL above fp32", gap.estimate, "nats", 0.0, None, gap.low, gap.high, len(units[0])),
            Row(f"{label}/bits per weight", bits, "bits", 32.0, 32.0 / bits),
            Row(f"{label}/time", seconds, "s"),
        ]
        interval = "" if method is None else f"{gap.estimate:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        table.add_row(kind, name, f"{bits:.2f}", f"{perplexity:.2f}", interval, f"{seconds:.0f}")
    if given.json:
        Result("quantize", rows).write(given.json)
    if given.json != "-":
        Console().print(table)


if __name__ == "__main__":
    main()
