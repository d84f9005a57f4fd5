"""The meters: time of reading and of decoding, energy, memory of a process; and a fair order of measuring."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

RAPL = Path("/sys/class/powercap")
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """One `generate` call, in seconds.

    Attributes:
        prompt_tokens: tokens of the prompt.
        read: inside the model's forward passes before the first token.
        first_token: from the call to the first token: reading, and whatever a method does to the cache after it.
        decode: median time of a further token.
        total: the whole call.
        energy: joules of the processor during the call, None where they cannot be read.
    """

    prompt_tokens: int
    read: float
    first_token: float
    decode: float
    total: float
    energy: float | None


@dataclass
class _Stamps(BaseStreamer):
    """A streamer that notes when each token came; generate() hands it the prompt first."""

    times: list[float] = field(default_factory=list)

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def time_generation(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> Timing:
    """Greedy generation of exactly `new_tokens` >= 2 tokens after the prompt `ids` `[1, tokens]`.

    Works inside any method's context: the time of the forward passes is taken by hooks, the rest by a streamer.
    """
    stamps, passes = _Stamps(), list[float]()
    entered: list[float] = []

    def before(module: torch.nn.Module, args: Any) -> None:
        entered.append(time.perf_counter())

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        # A method may read a long prompt in pieces from within a pass: only the innermost passes are reading.
        if len(stamps.times) < 2 and entered:  # one for the prompt; the second is the first token
            passes.append(time.perf_counter() - entered.pop())
            entered.clear()

    # Ours is the innermost pair, so what a method's own hooks do is not counted as reading.
    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after, prepend=True)]
    energy = EnergyMeter()
    try:
        with energy:
            start = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=stamps,
            )
            end = time.perf_counter()
    finally:
        for hook in hooks:
            hook.remove()
    tokens = torch.tensor(stamps.times[1:], dtype=torch.float64)
    return Timing(
        prompt_tokens=ids.shape[1],
        read=sum(passes),
        first_token=float(tokens[0]) - start,
        decode=float(tokens.diff().median()),
        total=end - start,
        energy=energy.joules,
    )


def interleaved(arms: Mapping[str, Callable[[], T]], repeats: int) -> Iterator[tuple[str, T]]:
    """Run every arm once, then every arm again, so that a drifting machine hurts all alike. Warming up is the caller's.

    Every other round runs backwards, so that no arm always follows the same one.
    """
    for turn in range(repeats):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            yield name, arms[name]()


class EnergyMeter:
    """Joules that the processor packages took inside a `with` block, from the kernel's RAPL counters.

    `joules` is None where there are none or they may not be read (most virtual machines; root only on many systems).
    """

    def __init__(self, root: Path = RAPL) -> None:
        self.zones = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self.joules: float | None = None

    def _read(self) -> list[tuple[int, int]] | None:
        try:
            return [
                (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text()))
                for zone in self.zones
            ] or None
        except (OSError, ValueError):
            return None

    def __enter__(self) -> EnergyMeter:
        self._start = self._read()
        return self

    def __exit__(self, *unused: object) -> None:
        end = self._read()
        if self._start is None or end is None:
            return
        # A counter that passed its range starts again at zero.
        spent = [(b - a) % (span + 1) for (a, span), (b, _) in zip(self._start, end, strict=True)]
        self.joules = sum(spent) / 1e6


def peak_memory(target: str, *arguments: Any, timeout: float = 1800) -> int:
    """Peak resident bytes of `in_fresh_process`; see there."""
    return in_fresh_process(target, *arguments, timeout=timeout)[1]


def in_fresh_process(target: str, *arguments: Any, timeout: float = 1800) -> tuple[Any, int]:
    """What `target` ("module:function") returns for JSON arguments in a fresh Python process (None where that is no
    JSON), and the process's peak resident bytes.

    Raises:
        RuntimeError: the process failed, with the last line it wrote, or took too long.
    """
    code = "from lissom.devices.meters import _call; _call()"
    command = [sys.executable, "-c", code, target]
    try:
        done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"it took more than {timeout:.0f} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it was killed"])[-1])
    returned, peak = json.loads(done.stdout.splitlines()[-1])
    return returned, peak


def _call() -> None:
    from importlib import import_module

    module, _, function = sys.argv[1].partition(":")
    returned = getattr(import_module(module), function)(*json.load(sys.stdin))
    print(json.dumps([returned, _peak_bytes()], default=lambda _: None))


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch and the native kernels use `count` threads inside the block (None: as it is)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
