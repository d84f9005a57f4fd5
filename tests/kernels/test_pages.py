"""Huge pages change where bytes lie, never what they are."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lissom.kernels import pages

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def test_collapsing_keeps_the_values_and_addresses():
    tensors = [torch.randn(n) for n in (10, 3_000_000, 700_000)]
    before = [(tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    pages.collapse([*tensors, torch.empty(0)])
    for tensor, (place, values) in zip(tensors, before, strict=True):
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, values)


def test_tensors_of_a_mapped_file_get_memory_of_their_own(tmp_path):
    wanted = torch.randn(64, 1024)
    save_file({"a": wanted}, tmp_path / "x.safetensors")
    mapped, own = load_file(tmp_path / "x.safetensors")["a"], torch.randn(5)
    alias, place, other = mapped.view(64, 1024), mapped.data_ptr(), own.data_ptr()
    assert any(begin <= place < end for begin, end in pages._mapped_files())
    pages.unmap([mapped, alias, own])
    assert mapped.data_ptr() != place
    assert alias.data_ptr() == mapped.data_ptr()  # one copy for what shared memory
    assert torch.equal(mapped, wanted)
    assert own.data_ptr() == other


@pytest.mark.parametrize("like", [torch.empty(0, dtype=torch.bfloat16), torch.empty(0, device="meta")], ids=str)
def test_zeros_of_any_size(like):
    for shape in ((0,), (3, 5), (50_000, 64)):
        made = pages.zeros(like, shape)
        assert (made.shape, made.dtype, made.device) == (torch.Size(shape), like.dtype, like.device)
        assert made.is_meta or not made.any()


def test_large_zeros_are_in_huge_pages():
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as setting:
        if "[never]" in setting.read():
            pytest.skip("the system has none")

    def huge() -> int:
        with open("/proc/self/smaps_rollup") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))

    before = huge()
    made = pages.zeros(torch.empty(0), (50_000_000,))
    assert huge() - before > made.nbytes / 1024 / 2
