"""The native library: finding it, loading it, choosing its instruction set."""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from lissom.errors import UserError

logger = logging.getLogger(__name__)

_FILE = Path(__file__).parent / "_native.so"
ISA_NAMES = ("portable", "avx2", "avx512")


@dataclass(frozen=True)
class NativeStatus:
    """Whether native kernels run, with which instruction set (of `ISA_NAMES`), and why or why not."""

    available: bool
    isa: str | None
    reason: str


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where this installation has none or `LISSOM_ISA=off`."""
    wanted = os.environ.get("LISSOM_ISA", "")
    if wanted not in ("", "off", *ISA_NAMES):
        raise UserError(f"LISSOM_ISA={wanted}: expected {', '.join(ISA_NAMES)} or off.")
    if wanted == "off" or not _FILE.exists():
        return None
    try:
        native = ctypes.CDLL(str(_FILE))
    except OSError as error:
        logger.warning("The native kernels could not be loaded: %s.", error)
        return None
    if wanted:
        native.lissom_set_isa(ISA_NAMES.index(wanted))
    return native


def call(kernel: str, arguments: ctypes.Structure) -> None:
    """Run `lissom_<kernel>` of the library on as many threads as PyTorch uses.

    Raises:
        ValueError: the arguments do not fit together.
        MemoryError: there is not enough memory.
    """
    code = getattr(library(), f"lissom_{kernel}")(ctypes.byref(arguments), torch.get_num_threads())
    if code == -2:
        raise MemoryError(f"There is not enough memory for {kernel}.")
    if code:
        raise ValueError(f"The arguments of {kernel} do not fit together.")


def say_reference(kernel: str, like: torch.Tensor) -> None:
    """Log, once for each reason, that `kernel` runs as its PyTorch reference for a tensor such as `like`."""
    reason = f"{like.dtype} on {like.device.type}" if library() else "native kernels are not available"
    _say_once(f"{kernel} runs as its PyTorch reference: {reason}.")


@cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


def set_isa(name: str) -> str:
    """Use the instruction set `name` where the CPU has it; returns the name of what is used."""
    native = library()
    if native is None:
        raise RuntimeError("There are no native kernels in this installation.")
    return ISA_NAMES[native.lissom_set_isa(ISA_NAMES.index(name))]


def available_isas() -> tuple[str, ...]:
    """Instruction sets that can be chosen here, slowest first; empty without native kernels."""
    native = library()
    return () if native is None else ISA_NAMES[: native.lissom_best_isa() + 1]


def status() -> NativeStatus:
    """What runs here, for `lissom doctor`."""
    native = library()
    if native is not None:
        isa = ISA_NAMES[native.lissom_get_isa()]
        return NativeStatus(
            True, isa, "chosen by the CPU's flags" if not os.environ.get("LISSOM_ISA") else "LISSOM_ISA"
        )
    if os.environ.get("LISSOM_ISA") == "off":
        return NativeStatus(False, None, "switched off by LISSOM_ISA=off")
    if _FILE.exists():
        return NativeStatus(False, None, f"{_FILE} could not be loaded: it was built for another machine")
    return NativeStatus(
        False, None, "this installation was made without a C++ compiler; install one (apt install g++) and reinstall"
    )
