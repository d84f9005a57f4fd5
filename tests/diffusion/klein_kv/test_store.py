from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.diffusion.klein_kv.store import Entry, ReferenceStore, pack, unpack
from lissom.errors import UserError


def entry(tokens=4, storage="model", seed=0):
    random = torch.Generator().manual_seed(seed)
    tensors = [pack(torch.randn(1, tokens, 2, 8, generator=random), storage) for _ in range(6)]
    return Entry(tuple(tensors[:3]), tuple(tensors[3:]))


SIZE = entry().nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_rounding_to_a_127th_of_the_largest_of_each_token_and_head(dtype):
    tensor = (torch.randn(2, 5, 3, 16) * torch.rand(2, 5, 3, 1).exp()).to(dtype)
    tensor[0, 0, 0] = 0
    packed = pack(tensor, "int8")
    wide = tensor.double().numpy()
    largest = np.abs(wide).max(-1, keepdims=True)
    wanted = np.round(np.divide(wide * 127, largest, out=np.zeros_like(wide), where=largest > 0)) * largest / 127
    room = largest * (2e-3 if dtype is not torch.float32 else 1e-6) + torch.finfo(dtype).eps * np.abs(wanted)
    assert (np.abs(unpack(packed).double().numpy() - wanted) <= room + largest / 127 * 1e-3).all()
    assert unpack(packed).dtype == dtype
    assert packed.nbytes < tensor.nbytes * (0.63 if dtype is not torch.float32 else 0.32)


def test_fp8_has_three_bits_behind_the_first():
    tensor = torch.randn(2, 5, 3, 16) * 100
    packed = pack(tensor, "fp8")
    largest = tensor.abs().amax(-1, keepdim=True)
    room = (tensor.abs() / 16).clamp(min=2**-10 * 1.01 / 448 * largest)  # below 2^-6 steps are even
    assert ((unpack(packed) - tensor).abs() <= room).all()
    assert packed.nbytes == tensor.numel() * 1.25


def test_what_is_stored_as_it_is_comes_back_as_it_was():
    tensor = torch.randn(1, 4, 2, 8)
    assert torch.equal(unpack(pack(tensor, "model")), tensor)


@given(st.lists(st.tuples(st.sampled_from("pg"), st.integers(0, 5)), max_size=40), st.integers(1, 4))
def test_the_ones_used_last_are_kept(steps, room):
    store, kept, hits = ReferenceStore(room * SIZE), [], 0
    for what, number in steps:
        key = str(number)
        there = key in kept
        if what == "p":
            store.put(key, entry())
        else:
            assert (store.get(key) is not None) == there
            hits += there
        if what == "p" or there:
            kept = [*(own for own in kept if own != key), key][-room:]
        assert len(store) == len(kept) and store.nbytes == len(kept) * SIZE <= store.limit
    assert store.hits == hits and store.misses == sum(what == "g" for what, _ in steps) - hits


def test_what_is_larger_than_the_store_is_told():
    store = ReferenceStore(SIZE)
    store.put("fits", entry())
    with pytest.raises(UserError, match=r"5 tokens of references take .* MB, and the store holds"):
        store.put("large", entry(tokens=5))
    assert store.get("fits") is not None
    assert ReferenceStore("1.5MB").limit == 1_500_000
    with pytest.raises(UserError, match="is no size"):
        ReferenceStore(0)


def test_many_threads():
    store = ReferenceStore(3 * SIZE)

    def use(number):
        for step in range(50):
            if store.get(str((number + step) % 5)) is None:
                store.put(str((number + step) % 5), entry())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert len(store) <= 3 and store.hits + store.misses == 400
