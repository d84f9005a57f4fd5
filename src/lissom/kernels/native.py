"""The native library: finding it, loading it, choosing its instruction set."""

from __future__ import annotations

import ctypes
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lissom.errors import UserError

logger = logging.getLogger(__name__)

_FILE = Path(__file__).parent / "_native.so"
# Instruction sets by family, slowest first. `LISSOM_ISA` can name any of them.
_FAMILIES = (("portable", "avx2", "avx512", "avx512_bf16"), ("portable", "neon"))
_mirrors: dict[int, type[ctypes.Structure]] = {}


@dataclass(frozen=True)
class NativeStatus:
    """Whether native kernels run, with which instruction set, and why or why not."""

    available: bool
    isa: str | None
    reason: str


def mirror(number: int, structure: type[ctypes.Structure]) -> None:
    """Declare `structure` as the mirror of struct `number` of `lissom_sizeof`, so that a library of another version
    is noticed when it is loaded."""
    _mirrors[number] = structure


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where this installation has none or `LISSOM_ISA=off`."""
    wanted, known = os.environ.get("LISSOM_ISA", ""), dict.fromkeys(sum(_FAMILIES, ()))
    if wanted not in ("", "off", *known):
        raise UserError(f"LISSOM_ISA={wanted}: expected {', '.join(known)} or off.")
    if wanted == "off" or not _FILE.exists():
        return None
    try:
        native = ctypes.CDLL(str(_FILE))
        native.lissom_isa_name.restype = ctypes.c_char_p
        native.lissom_sizeof.restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        logger.warning("The native kernels could not be loaded: %s.", error)
        return None
    if any(native.lissom_sizeof(number) != ctypes.sizeof(kind) for number, kind in _mirrors.items()):
        logger.warning("The native kernels are of another version than the Python code; reinstall lissom.")
        return None
    if wanted:
        names = isa_names(native)
        native.lissom_set_isa(names.index(wanted) if wanted in names else len(names) - 1)
    return native


def isa_names(native: ctypes.CDLL) -> tuple[str, ...]:
    """Instruction sets that the library was built for, slowest first."""
    names = iter(lambda: native.lissom_isa_name(len(found)), None)
    found: list[str] = []
    for name in names:
        found.append(name.decode())
    return tuple(found)


def call(kernel: str, *arguments: Any) -> None:
    """Run `lissom_<kernel>` of the library on as many threads as PyTorch uses. Structures go by reference.

    Raises:
        ValueError: the arguments do not fit together.
        MemoryError: there is not enough memory.
    """
    given = [ctypes.byref(part) if isinstance(part, ctypes.Structure) else part for part in arguments]
    code = _function(kernel)(*given, torch.get_num_threads())
    if code == -2:
        raise MemoryError(f"There is not enough memory for {kernel}.")
    if code:
        raise ValueError(f"The arguments of {kernel} do not fit together.")


@cache
def _function(kernel: str) -> Any:
    return getattr(library(), f"lissom_{kernel}")


def say_reference(kernel: str, like: torch.Tensor, reason: str = "") -> None:
    """Log, once for each reason, that `kernel` runs as its PyTorch reference for a tensor such as `like`."""
    if not reason:
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
    names = isa_names(native)
    return names[native.lissom_set_isa(names.index(name))]


def available_isas() -> tuple[str, ...]:
    """Instruction sets that can be chosen here, slowest first; empty without native kernels."""
    native = library()
    return () if native is None else isa_names(native)[: native.lissom_best_isa() + 1]


def status() -> NativeStatus:
    """What runs here, for `lissom doctor`."""
    native = library()
    if native is not None:
        isa = isa_names(native)[native.lissom_get_isa()]
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
