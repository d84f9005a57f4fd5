"""What branches cost while a model is trained: layers and whole steps, fused, operation by operation, and without.

Fused is what layers do by themselves: `[W | W_down]` as one product, one pass through both cosines, and a backward pass
that computes the activation again. Whole steps are also timed under torch.compile. On a CPU in fp32, on a GPU in bf16.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lissom.devices.machine import describe
from lissom.evals.stats import Interval, ratio_interval, verdict
from lissom.evals.training_steps import kept_bytes, loss_of, operations, rounds_of, step
from lissom.report.rows import Claim, Result, Row
from lissom.weights.noble import NobleConfig, noble_parameter_groups
from lissom.weights.noble.apply import layers_of

PLAIN, EAGER, FUSED = "plain", "operation by operation", "fused"
COMPILED = {PLAIN: "plain, compiled", EAGER: "operation by operation, compiled", FUSED: "fused, compiled"}
SOURCE = "lissom"
SHAPES = {"cpu": ((128, 384, 8), (576, 576, 32), (576, 1536, 32), (1536, 576, 64)),
          "cuda": ((1024, 1024, 64), (1024, 4096, 64), (2048, 2048, 128), (2048, 8192, 128))}  # fmt: skip
TOKENS = {"cpu": 2048, "cuda": 16384}
_COMMON: dict[str, Any] = {"tie_word_embeddings": False, "max_position_embeddings": 2048}
MODELS = {
    "cpu": (LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
                        num_key_value_heads=3, vocab_size=4096, **_COMMON), 32, (2, 512)),
    "cuda": (LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
                         num_key_value_heads=16, vocab_size=32768, **_COMMON), 64, (16, 1024)),
}  # fmt: skip


def layer_rows(columns: int, rows: int, rank: int, rounds: int, device: str) -> list[Row]:
    """One layer, forward and backward."""
    tokens, dtype = TOKENS[device], torch.bfloat16 if device == "cuda" else torch.float32
    layers: dict[str, Any] = {}
    for name in (PLAIN, EAGER, FUSED):
        holder = nn.ModuleList([nn.Linear(columns, rows, bias=False, device=device, dtype=dtype)])
        layers[name] = holder[0] if name == PLAIN else NobleConfig(rank=rank).convert(holder)[0]
    layers[EAGER].fused = False
    x = torch.randn(tokens, columns, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, rows, device=device, dtype=dtype)
    works = {name: lambda layer=layer: layer(x).backward(gradient) for name, layer in layers.items()}
    seconds = rounds_of(works, rounds)
    title = f"layer/{columns} to {rows}, rank {rank}"
    found = [_row(f"{title}/{name}", seconds, name, PLAIN) for name in layers]
    found.append(_row(f"{title}/{FUSED} against {EAGER}", seconds, FUSED, EAGER))
    return found


def step_rows(rounds: int, device: str, quick: bool) -> list[Row]:
    """A whole step of training, and what its forward pass keeps."""
    config, rank, shape = MODELS[device]
    if quick:
        config = LlamaConfig(**config.to_diff_dict() | {"num_hidden_layers": 1})
    ids, bf16 = torch.randint(config.vocab_size, shape, device=device), device == "cuda"
    models = {}
    for name in (PLAIN, EAGER, FUSED):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        models[name] = model if name == PLAIN else NobleConfig(rank=rank).convert(model)
        models[name].to(device)
    for layer in layers_of(models[EAGER]).values():
        layer.fused = False

    flops = {name: operations(model) for name, model in models.items()}
    counts = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    kept = {name: kept_bytes(model, partial(loss_of, model, ids, bf16)) for name, model in models.items()}
    runs: dict[str, Any] = models | {COMPILED[name]: torch.compile(model) for name, model in models.items()}
    optimizers = {
        name: torch.optim.AdamW(noble_parameter_groups(model, 1e-4, 0.1), fused=True) for name, model in models.items()
    }
    optimizers |= {COMPILED[name]: own for name, own in optimizers.items()}
    works = {name: partial(step, model, optimizers[name], ids, bf16) for name, model in runs.items()}
    seconds = rounds_of(works, rounds)
    title = f"step/{counts[PLAIN] / 1e6:.0f}M parameters, rank {rank}"
    found = [_row(f"{title}/{name}", seconds, name, PLAIN) for name in runs]
    found.append(_row(f"{title}/{FUSED} against {EAGER}", seconds, FUSED, EAGER))
    for ours, base in ((EAGER, PLAIN), (FUSED, PLAIN), (FUSED, EAGER)):
        ours, base = COMPILED[ours], COMPILED[base]
        found.append(_row(f"{title}/{ours} against {base}", seconds, ours, base))
    for what, values, unit in (("operations", flops, "FLOP/token"), ("parameters", counts, ""), ("kept", kept, "B")):
        for name in (EAGER, FUSED):
            found.append(Row(f"{title}/{what}/{name}", values[name], unit, values[PLAIN],
                             values[PLAIN] / values[name]))  # fmt: skip
    return found


def _row(title: str, seconds: dict[str, list[float]], ours: str, base: str) -> Row:
    """Milliseconds, and the ratio to another's, better above 1."""
    ratio = ratio_interval(seconds[base], seconds[ours])
    values = [sorted(seconds[name])[len(seconds[name]) // 2] * 1e3 for name in (ours, base)]
    return Row(title, values[0], "ms", values[1], ratio.estimate, ratio.low, ratio.high, len(seconds[ours]))


def claims(rows: Sequence[Row]) -> list[Claim]:
    """The fused pass against the plain composition."""
    found = []
    for row in rows:
        if row.name.endswith(f"/{FUSED} against {EAGER}"):
            slower = Interval(1 - row.ratio, 1 - row.high, 1 - row.low)  # type: ignore[operator]
            words = f"{row.name.rpartition('/')[0]}: the fused pass is faster than operation by operation"
            found.append(Claim(words, SOURCE, verdict([slower], strict=True)))
    kept = {row.name.rpartition("/")[2]: row.value for row in rows if "/kept/" in row.name}
    if kept:
        share = kept[FUSED] / kept[EAGER]
        words = f"the fused pass keeps less for the gradients: {share:.2f} of what operation by operation does"
        found.append(Claim(words, SOURCE, "holds" if share < 1 else "does not hold"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest layer and a model of one layer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    rounds = 5 if given.quick else 25
    rows: list[Row] = []
    for shape in SHAPES[given.device][: 1 if given.quick else None]:
        rows += layer_rows(*shape, rounds, given.device)
    rows += step_rows(rounds, given.device, given.quick)
    result = Result(f"noble-cost-{given.device}", rows, claims(rows), describe(gpu=given.device == "cuda"))
    if given.json:
        result.write(given.json)
    if given.json != "-":
        for row in rows:
            ratio = f"{row.ratio:.2f}x" if row.ratio is not None else ""
            between = f"[{row.low:.2f}, {row.high:.2f}]" if row.low is not None else ""
            print(f"{row.name:72} {row.value:14.2f} {row.unit:10} {ratio} {between}")
        for claim in result.claims:
            print(f"{claim.verdict}: {claim.claim}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
