"""Huge pages for what every token reads once. Through pages of 4 KiB a thread reads little more than half of what
memory gives where looking a page up takes two walks, as in a virtual machine. Linux only; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

_SMALL, _HUGE = 2**12, 2**21
_WANTED, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, since Linux 6.1


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


def collapse(tensors: Iterable[torch.Tensor]) -> None:
    """Move what tensors on the CPU hold into huge pages, in place. Takes milliseconds for each the first time, and as
    many microseconds where they are huge already; what the system refuses stays as it is."""
    if _madvise() is None:
        return
    covered: dict[int, int] = {}
    for begin, end in {(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors}:
        for page in range(begin // _HUGE, -(-end // _HUGE)):
            covered[page] = covered.get(page, 0) + min(end, (page + 1) * _HUGE) - max(begin, page * _HUGE)
    for page, size in covered.items():
        if 2 * size >= _HUGE:  # else it would mostly hold something else
            _madvise()(page * _HUGE, _HUGE, _COLLAPSE)


def zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`like.new_zeros(shape)`, in huge pages where it is large."""
    tensor = like.new_empty(shape)
    if tensor.is_cpu and tensor.nbytes >= _HUGE and _madvise() is not None:
        begin = -(-tensor.data_ptr() // _SMALL) * _SMALL
        # Before it is written to: then they are made huge at once, and not moved.
        _madvise()(begin, (tensor.data_ptr() + tensor.nbytes - begin) // _SMALL * _SMALL, _WANTED)
    return tensor.zero_()


def unmap(tensors: Iterable[torch.Tensor]) -> None:
    """Give tensors that lie in a mapped file, which has no huge pages, memory of their own, in place."""
    if _madvise() is None:
        return
    files, moved = _mapped_files(), dict[tuple[int, torch.dtype, tuple[int, ...]], torch.Tensor]()
    for tensor in tensors:
        place = tensor.data_ptr()
        if tensor.is_inference() or not any(begin <= place < end for begin, end in files):
            continue
        key = place, tensor.dtype, tuple(tensor.shape)
        if key not in moved:  # what shares memory goes on doing so
            moved[key] = tensor.detach().clone()
        tensor.data = moved[key]


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are files."""
    found = []
    with open("/proc/self/maps") as lines:
        for line in lines:
            addresses, _, _, _, inode, *_ = line.split()
            if inode != "0":
                begin, end = addresses.split("-")
                found.append((int(begin, 16), int(end, 16)))
    return found
