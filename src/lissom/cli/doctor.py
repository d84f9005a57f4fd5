"""`lissom doctor`: what this machine has, which kernels run here and why, what is missing."""

from __future__ import annotations

import importlib.util
import shutil

import typer

from lissom.cli.common import JSON


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(json_file: str = JSON) -> None:
    """Show CPU, memory, measured rates, the kernels that run here, and the optional parts that are missing."""
    import torch

    from lissom.devices.machine import describe, measure_bandwidth, measure_gemm
    from lissom.files import write_json
    from lissom.kernels import native

    facts = describe()
    facts["measured"] = {
        "read_bandwidth_gb_s": round(measure_bandwidth(), 1),
        "gemm_fp32_gflop_s": round(measure_gemm(torch.float32)),
        "gemm_bf16_gflop_s": round(measure_gemm(torch.bfloat16)),
    }
    status = native.status()
    path = {"path": status.isa or "pytorch", "why": status.reason}
    facts["kernels"] = {kernel: path for kernel in ("decode", "multiply", "attention_statistics", "ragged_attention")}
    facts["missing"] = missing_parts()
    if json_file:
        write_json(facts, json_file)
    if json_file == "-":
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="lissom doctor")
    machine, measured = facts["machine"], facts["measured"]
    table.add_row("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads used")
    table.add_row("flags", " ".join(machine["flags"]) or "none that matter")
    table.add_row("memory", f"{machine['memory'] / 2**30:.1f} GiB")
    table.add_row("memory read", f"{measured['read_bandwidth_gb_s']} GB/s (measured)")
    table.add_row(
        "matrix product",
        f"fp32 {measured['gemm_fp32_gflop_s']}, bf16 {measured['gemm_bf16_gflop_s']} GFLOP/s (measured)",
    )
    for kernel, facts_of in facts["kernels"].items():
        table.add_row(f"kernel {kernel}", f"{facts_of['path']}: {facts_of['why']}")
    table.add_row("versions", ", ".join(f"{name} {number}" for name, number in facts["versions"].items()))
    for part, command in facts["missing"].items():
        table.add_row(f"missing: {part}", command)
    Console().print(table)


def missing_parts() -> dict[str, str]:
    """Optional parts that are not here, and the command that installs each."""
    missing = {}
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        missing["C++ compiler (native kernels)"] = (
            "apt install g++, then pip install --force-reinstall --no-deps lissom"
        )
    if importlib.util.find_spec("triton") is None:
        missing["triton (GPU kernels)"] = "pip install triton"
    return missing
