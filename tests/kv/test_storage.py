"""The ragged storage against lists of tensors that are simply concatenated."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.kv.cache import CompactLayer, WindowLayer
from lissom.kv.storage import Block, RaggedStore, to_int8

DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SIZE = 6


def vectors(rows, heads, tokens, seed):
    return torch.randn(2, rows, heads, tokens, SIZE, generator=torch.Generator().manual_seed(seed))


def rounded(values, dtype):
    """What is left of `values` in the storage."""
    if dtype != torch.int8:
        return values.to(dtype).float()
    codes, scales = to_int8(values)
    assert bool(((values - codes * scales[..., None].float()).abs() <= 0.51 * scales[..., None].float()).all())
    return codes.float() * scales[..., None].float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_capacity_grows_by_doubling_and_keeps_all(dtype):
    layer, kept, layouts, most = CompactLayer(), [], [], 0
    layer.kv_dtype = dtype
    for step in range(700):
        keys, values = vectors(2, 2, 1, step)
        layer.update(keys, values)
        kept.append((keys, values))
        layouts.append(layer.store.layout)
        most = max(most, layer.store.keys.shape[0] / 4 / (step + 1 + 128))
    assert len(set(layouts)) <= 6 and most <= 2  # nothing was copied at most steps, and less than half is spare
    keys, values = (torch.cat(part, 2) for part in zip(*kept, strict=True))
    for index, block in enumerate(layer.store.blocks()):
        assert block.keys.float().equal(rounded(keys[index // 2, index % 2], dtype))
        assert block.values.float().equal(rounded(values[index // 2, index % 2], dtype))
        assert block.positions.tolist() == list(range(700))
    assert layer.store.nbytes >= layer.stored_bytes == 4 * 700 * layer.store.entry_bytes
    # Codes of a byte and one scale of two bytes each for key and value, and the position.
    wide = {torch.float32: 4 * 2 * SIZE, torch.bfloat16: 2 * 2 * SIZE, torch.int8: 2 * SIZE + 2 * 2}[dtype]
    assert layer.store.entry_bytes == wide + 4


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 90)),
    st.tuples(st.just("crop"), st.integers(0, 40)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    st.tuples(st.just("mask"), st.lists(st.booleans(), min_size=8, max_size=8)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("reserve"), st.integers(0, 50)),
)


@given(operations=st.lists(OPERATIONS, max_size=14), dtype=st.sampled_from(DTYPES), biased=st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_order_of_operations(operations, dtype, biased):
    """Grown, cropped, selected, repeated, reordered, with and without room to spare."""
    layer, rows = CompactLayer(), 2
    layer.kv_dtype = dtype
    first = [Block(torch.randn(n, SIZE), torch.randn(n, SIZE), torch.arange(n)) for n in (3, 1, 0, 7)]
    if biased:
        first[1].bias = torch.tensor([1.5])
    layer.store, layer.logical = RaggedStore(first, rows, dtype=dtype), 7
    plain = [[(rounded(b.keys, dtype), rounded(b.values, dtype)) for b in first[2 * row :][:2]] for row in range(rows)]
    for number, (kind, value) in enumerate(operations):
        if kind == "append":
            keys, values = vectors(len(plain), 2, value, number)
            layer.update(keys, values)
            new = rounded(keys, dtype), rounded(values, dtype)
            plain = [
                [tuple(torch.cat([old[k], new[k][row, head]]) for k in (0, 1)) for head, old in enumerate(heads)]
                for row, heads in enumerate(plain)
            ]
        elif kind == "crop":
            value = min(value, layer.tail)
            layer.crop(-value)
            plain = [[(k[: len(k) - value], v[: len(v) - value]) for k, v in heads] for heads in plain]
        elif kind == "select":
            wanted = [index % len(plain) for index in value]
            layer.reorder_cache(torch.tensor(wanted))
            plain = [plain[index] for index in wanted]
        elif kind == "mask":
            wanted = [index for index, keep in enumerate(value[: len(plain)]) if keep] or [0]
            layer.batch_select_indices(torch.tensor([index in wanted for index in range(len(plain))]))
            plain = [plain[index] for index in wanted]
        elif kind == "repeat" and len(plain) <= 4:
            layer.batch_repeat_interleave(value)
            plain = [heads for heads in plain for _ in range(value)]
        elif kind == "reserve":
            layer.store.reserve(value)
            assert layer.store.spare == value
        flat = [pair for heads in plain for pair in heads]
        assert layer.store.lengths.tolist() == [len(k) for k, _ in flat] and layer.store.uncounted == 0
        for block, (keys, values) in zip(layer.store.blocks(), flat, strict=True):
            assert block.keys.float().equal(keys) and block.values.float().equal(values)
            assert (block.bias is None) == (not biased)


@pytest.mark.parametrize("stop", range(6))
def test_an_interrupt_while_it_is_laid_out_anew_leaves_what_was(stop, monkeypatch):
    """At every call that allocates."""
    store = RaggedStore([Block(torch.randn(5, SIZE), torch.randn(5, SIZE), torch.arange(5))] * 4, 2, dtype=torch.int8)
    before, plain, calls = store.entries(), torch.Tensor.new_empty, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", interrupted)
    try:
        store.make_room(100)
    except KeyboardInterrupt:
        assert store.spare == 0
    else:
        assert store.spare >= 100 and stop >= 5
    monkeypatch.undo()
    assert all(now.equal(before[name]) for name, now in store.entries().items()) and store.uncounted == 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("layer", [CompactLayer, lambda: WindowLayer(8)], ids=["full", "window"])
def test_what_was_stored_in_inference_mode_can_be_gone_on_with(layer, mode):
    layer = layer()
    layer.kv_dtype = torch.int8
    with mode():
        layer.update(*vectors(1, 2, 9, 0))
    with torch.no_grad():
        layer.update(*vectors(1, 2, 3, 1))
    layer.crop(-2)
    layer.batch_repeat_interleave(2)
    with torch.inference_mode():
        layer.update(*vectors(2, 2, 100, 2))
    assert layer.get_seq_length() == 110 and not any(t.is_inference() for t in layer.store.buffers().values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_pytorch_s_default_dtype_changes_nothing(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        keys = torch.ones(3, SIZE, dtype=torch.float32)
        bias = torch.full((3,), 0.1234567, dtype=torch.float32)
        store = RaggedStore([Block(keys, keys, torch.arange(3)), Block(keys, keys, torch.arange(3), bias)], 1)
    finally:
        torch.set_default_dtype(before)
    assert store.bias.dtype == torch.float32 and store.block(1).bias.equal(bias) and not store.block(0).bias.any()


def test_dense_keys_and_values_have_nothing_of_other_blocks():
    """Where a block has no entry there is zero and a bias of -inf, whatever lies in the buffers."""
    empty, full = (
        Block(torch.full((n, SIZE), 2.0), torch.ones(n, SIZE), torch.arange(n, dtype=torch.int32)) for n in (0, 3)
    )
    for first, second in ((empty, full), (full, empty)):
        store = RaggedStore([first, second], 1, spare=2)
        for index in range(2):
            start, end = int(store.starts[index]), int(store.starts[index] + store.lengths[index])
            store.keys[end : start + int(store.lengths[index]) + 2] = torch.nan
            store.values[end : start + int(store.lengths[index]) + 2] = torch.nan
        keys, values, bias = store.padded()
        for head, block in enumerate((first, second)):
            held = len(block.keys) > 0
            assert keys[0, head].eq(2.0 if held else 0.0).all() and values[0, head].eq(1.0 if held else 0.0).all()
            assert bias[0, head].eq(0.0 if held else -torch.inf).all()
    keys, values, bias = RaggedStore([empty, empty], 1).padded()
    assert keys.shape == values.shape == (1, 2, 0, SIZE) and bias is None


def test_no_more_is_dropped_than_there_is():
    store = RaggedStore([Block(torch.ones(n, SIZE), torch.ones(n, SIZE), torch.arange(n)) for n in (3, 5)], 1)
    for drop in (store.drop_last, store.drop_first):
        for tokens in (-1, 4):
            with pytest.raises(ValueError, match="cannot be removed"):
                drop(tokens)
    assert store.lengths.tolist() == [3, 5] and store.spare == 0


def test_int8_shows_what_it_cannot_hold():
    """NaN and what is larger than any scale come back as no numbers, and not as others."""
    vectors = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [1e9, 1.0], [3.0, 1.0]])
    codes, scales = to_int8(vectors)
    back = codes.float() * scales.float()[:, None]
    assert not back[:3, 0].isfinite().any() and back[3].allclose(vectors[3], atol=0.02)


def test_what_is_appended_has_no_bias_of_what_was_there():
    keys = torch.ones(3, SIZE)
    store = RaggedStore([Block(keys, keys, torch.arange(3), torch.tensor([1.0, 2.0, 3.0]))], 1, spare=2)
    store.drop_last(2)
    store.append(torch.ones(1, 1, 2, SIZE), torch.ones(1, 1, 2, SIZE), 3)
    assert store.block(0).bias.tolist() == [1.0, 0.0, 0.0] and store.block(0).positions.tolist() == [0, 3, 4]
