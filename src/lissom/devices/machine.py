"""What this machine is and what it can reach: description, memory bandwidth, matrix rate."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from lissom.kernels import pages

# The flags that decide which kernels run.
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimddp")


def describe(gpu: bool = False) -> dict[str, Any]:
    """CPU, flags, cores, threads, memory in bytes, system, versions and date: what every measured result carries.

    Args:
        gpu: whether it is measured on a GPU where there is one.
    """
    name, flags = _cpu()
    return {
        "machine": {
            "cpu": name,
            "flags": [flag for flag in FLAGS if flag in flags],
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory": psutil.virtual_memory().total,
            "system": platform.platform(),
            **({"gpu": torch.cuda.get_device_name()} if gpu and torch.cuda.is_available() else {}),
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("lissom", "torch", "transformers")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return name, flags


def fast_bf16() -> bool:
    """Whether this machine multiplies bf16 faster than fp32: GPUs, and processors that have instructions for it."""
    return torch.accelerator.is_available() or bool({"avx512_bf16", "amx_bf16"} & _cpu()[1])


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure_bandwidth(megabytes: int = 512) -> float:
    """GB/s at which a sum reads main memory, in huge pages where there are any, with the current number of threads
    (median of 5)."""
    data = torch.ones(megabytes * 2**20 // 4)
    pages.collapse([data])
    return data.nbytes / _median_seconds(data.sum, 5) / 1e9


def measure_gemm(dtype: torch.dtype, size: int = 1024) -> float:
    """GFLOP/s of a square matrix product with the current number of threads (median of 5)."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / _median_seconds(lambda: a @ b, 5) / 1e9
