"""`sparse_prefill` and the semantics of selection, against each other and against brute force in double precision."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lissom import sparse_prefill
from lissom.attention.flash_prefill import controls, selection
from lissom.attention.flash_prefill.prefill import _plain
from lissom.errors import UserError
from lissom.kernels import native
from lissom.kernels.blocks import Rules

ISAS = native.available_isas()
SHAPES = [  # tokens, entries, query heads, KV heads, head_dim, block, shared, scoring, corrected, padding
    (300, 300, 3, 1, 64, 128, False, "flashprefill", False, (0, 0)),
    (700, 900, 6, 2, 64, 64, False, "row-normalised", True, (0, 350)),
    (513, 513, 8, 2, 32, 128, True, "flashprefill", True, (100, 0)),
    (200, 1000, 4, 1, 80, 128, False, "flashprefill", False, (850, 999)),
    (129, 129, 4, 4, 16, 64, True, "row-normalised", False, (128, 5)),
    (1, 700, 4, 1, 64, 64, False, "flashprefill", False, (0, 3)),
]


SMALL = SHAPES[3:5]  # in which there is nothing to leave out


def thresholds(heads):
    """One for each head, of which some leave out all that may be left out, and some nothing."""
    return torch.tensor([0.9, 2.0, 0.0, 0.6]).repeat(heads)[:heads]


@pytest.fixture(params=[isa for isa in ISAS])
def isa(request):
    before = native.status().isa
    yield native.set_isa(request.param)
    native.set_isa(before)


def inputs(tokens, entries, heads, kv_heads, size, rows=2, seed=0):
    """Keys that are alike within 64 of them, so that blocks differ in what they get."""
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(rows, count, length, size)
        for count, length in ((heads, tokens), (kv_heads, entries), (kv_heads, entries))
    )
    alike = torch.randn(rows, kv_heads, -(-entries // 64), size).repeat_interleave(64, 2)[:, :, :entries]
    return query, key + alike, value


def brute_energies(query, key, layout, scale, scoring):
    """One sequence, one query and block at a time, in Python."""
    group = len(query) // len(key)
    lists = len(query) // layout.group
    out = torch.full((lists, layout.tiles, layout.blocks), -math.inf, dtype=torch.float64)
    tile_of = [(layout.place + t) // layout.wide - layout.place // layout.wide for t in range(layout.tokens)]
    sums = torch.zeros_like(out)
    for head in range(len(query)):
        for token in range(layout.tokens):
            whole = (layout.place + token + 1) // layout.size
            if not whole:
                continue
            means = torch.stack(
                [key[head // group, j * layout.size : (j + 1) * layout.size].mean(0) for j in range(whole)]
            )
            weights = (means @ query[head, token] * scale).exp()
            if scoring == "row-normalised":
                weights = weights / weights.sum()
            sums[head // layout.group, tile_of[token], :whole] += weights
    return sums.log()


@pytest.mark.parametrize("scoring", ["flashprefill", "row-normalised"])
@pytest.mark.parametrize("tokens,entries,group", [(70, 70, 1), (130, 130, 2), (90, 200, 1), (150, 290, 2)])
def test_energies(tokens, entries, group, scoring):
    query, key, _ = (part[0].double() for part in inputs(tokens, entries, 4, 2, 8))
    layout = Rules(scoring, size=32, shared=group > 1).layout(tokens, entries, group)
    got = selection.energies(query, key, layout, 0.3)
    torch.testing.assert_close(got, brute_energies(query, key, layout, 0.3, scoring))


def test_forced_blocks():
    layout = Rules(sink=1, window=2, last=1).layout(1024, 1024, 1)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    for tile in range(8):
        for block in range(tile + 1):
            expected[tile, block] = block < 1 or tile - block < 2 or tile == 7
    assert torch.equal(layout.forced(), expected)
    # Nothing is in sight of the own block only.
    alone = Rules(sink=0, window=0, last=0).layout(512, 512, 1)
    assert torch.equal(alone.forced(), torch.eye(4, dtype=torch.bool))


def test_the_last_tiles_are_those_of_the_whole_prompt():
    assert not Rules(sink=0, window=1, last=2, following=256).layout(256, 256, 1).forced()[1, 0]
    assert Rules(sink=0, window=1, last=2).layout(256, 512, 1).forced().sum() == 7


@pytest.mark.parametrize("alpha,density", [(0.0, 1.0), (2.0, None)])
def test_extreme_thresholds(alpha, density):
    query, key, _ = (part[0] for part in inputs(900, 900, 2, 1, 16))
    layout = Rules().layout(900, 900, 2)
    chosen = selection.with_forced(selection.above(selection.energies(query, key, layout, 0.25), alpha), layout)
    expected = layout.causal() if density else layout.forced()
    assert torch.equal(chosen, expected.expand_as(chosen))


@pytest.mark.parametrize("name", controls.NAMES)
def test_controls_are_causal_and_forced(name):
    query, key, value = inputs(900, 1000, 4, 2, 16, rows=1)
    select = controls.control(name, alpha=torch.full((4,), 0.5), share=0.7, count=2, seed=3)
    found = sparse_prefill(query, key, value, rules=Rules(sink=1, window=1, last=1), select=select)
    layout = Rules(sink=1, window=1, last=1).layout(900, 1000, 2)
    chosen = found.selected[0]
    assert not bool((chosen & ~layout.causal()).any()) and bool((chosen | ~layout.forced()).all())


def test_controls_are_their_formulas():
    """One query and key at a time: mean queries (FlexPrefill), antidiagonals (XAttention), the fewest of a mass."""
    query, key, _ = (part[0] for part in inputs(150, 280, 2, 1, 8, rows=1))
    layout, scale, stride = Rules(size=32).layout(150, 280, 2), 0.3, 8
    flex = selection.of_mean_queries(query, key, layout, scale)
    anti = selection.of_antidiagonals(query, key, layout, scale, stride).exp()
    place, spans, rows = layout.place, layout.spans(), 280 // stride
    for head in range(2):
        logits = torch.full((rows, rows), -math.inf, dtype=torch.float64)
        for row in range(place // stride, rows):
            for column in range(row + 1):
                pairs = [(row * stride + stride - 1 - i - place, column * stride + i) for i in range(stride)]
                dots = [float(query[head, a] @ key[0, b]) for a, b in pairs if a >= 0]
                logits[row, column] = sum(dots) * scale / stride
        shares = logits.softmax(-1).nan_to_num(0.0)
        for tile, (first, last) in enumerate(spans):
            for block in range((place + last - 1) // 32 + 1):
                mean = query[head, first:last].mean(0) @ key[0, block * 32 : (block + 1) * 32].mean(0) * scale
                assert float(flex[head, tile, block]) == pytest.approx(float(mean), abs=1e-4)
                met = shares[(place + first) // stride : (place + last - 1) // stride + 1]
                wanted = float(met[:, block * 4 : (block + 1) * 4].sum())
                assert float(anti[head, tile, block]) == pytest.approx(wanted, abs=1e-4)
    energy = torch.tensor([[[0.2, 0.5, 0.3]]]).log()
    for share, chosen in ((0.4, [False, True, False]), (0.6, [False, True, True]), (0.9, [True, True, True])):
        assert selection.of_mass(energy, share)[0, 0].tolist() == chosen


def test_random_blocks_are_as_many():
    query, key, value = inputs(1500, 1500, 4, 2, 16, rows=1)
    rules = Rules(sink=1, window=1, last=0)
    ours = sparse_prefill(query, key, value, alpha=0.7, rules=rules).selected
    select = controls.control("random", alpha=torch.full((4,), 0.7), share=0.0, count=0, seed=0)
    random = sparse_prefill(query, key, value, rules=rules, select=select).selected
    assert torch.equal(ours.sum(-1), random.sum(-1)) and not torch.equal(ours, random)


@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_the_reference(shape, isa):
    tokens, entries, heads, kv_heads, size, block, shared, scoring, corrected, padding = shape
    parts = inputs(tokens, entries, heads, kv_heads, size)
    rules, alphas = Rules(scoring, block, 1, 1, 0, shared, corrected), thresholds(heads)
    got = sparse_prefill(*parts, alpha=alphas, rules=rules, padding=padding, estimate=True)
    wanted = _plain(*parts, rules, alphas, size**-0.5, list(padding), None, True)
    assert torch.equal(got.selected, wanted.selected)
    assert bool((wanted.dropped > 0).any()) == (shape not in SMALL)
    for one, other in zip(got[:4], wanted[:4], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["flashprefill", "row-normalised"])
def test_more_blocks_than_are_scored_at_once(scoring, isa):
    parts, rules = inputs(140, 9000, 2, 1, 16, rows=1), Rules(scoring, 64, 1, 1, 0)
    got = sparse_prefill(*parts, alpha=0.5, rules=rules)
    wanted = _plain(*parts, rules, torch.full((2,), 0.5), 0.25, [0], None, False)
    assert torch.equal(got.selected, wanted.selected) and 0 < int(got.selected.sum()) < got.selected.numel()
    torch.testing.assert_close(got.output, wanted.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("corrected", [False, True])
def test_reference_is_a_masked_softmax(corrected):
    """Of float64, with the means of what is left out as further keys where that is corrected."""
    tokens, entries, size = 300, 700, 64
    query, key, value = (part.double() for part in inputs(tokens, entries, 2, 1, 16, rows=1))
    rules = Rules(size=size, sink=1, window=1, last=0, corrected=corrected)
    found = _plain(query, key, value, rules, torch.full((2,), 0.6), 0.25, [0], None, True)
    layout = rules.layout(tokens, entries, 2)
    for head in range(2):
        for tile, (first, last) in enumerate(layout.spans()):
            chosen = found.selected[0, head, tile]
            for token in range(first, last):
                own = layout.place + token
                columns = [j for j in range(own + 1) if chosen[j // size]]
                left = [j for j in range((layout.place + first) // size) if not chosen[j]]
                means = [key[0, 0, j * size : (j + 1) * size].mean(0) for j in left]
                kept = key[0, 0, columns] @ query[0, head, token] * 0.25
                rest = [float(m @ query[0, head, token]) * 0.25 + math.log(size) for m in means]
                missing = torch.tensor(rest, dtype=torch.float64)
                logits, values = kept, value[0, 0, columns]
                share = float(missing.exp().sum() / (missing.exp().sum() + kept.exp().sum()))
                if corrected and left:
                    logits = torch.cat([kept, missing])
                    values = torch.cat([values, *(value[0, 0, j * size : (j + 1) * size].mean(0)[None] for j in left)])
                wanted = logits.softmax(0) @ values
                torch.testing.assert_close(found.output[0, head, token], wanted, atol=1e-12, rtol=1e-12)
                assert float(found.lse[0, head, token]) == pytest.approx(float(logits.logsumexp(0)), abs=1e-12)
                assert float(found.dropped[0, head, token]) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_alpha_zero_is_sdpa(tokens, group):
    query, key, value = inputs(tokens, tokens, 2 * group, 2, 64, rows=1)
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sparse_prefill(query, key, value, alpha=0.0).output, wanted, atol=1e-5, rtol=1e-5)
    halves = [part.bfloat16() for part in (query, key, value)]
    rounded = sparse_prefill(*halves, alpha=0.0).output
    exact = F.scaled_dot_product_attention(*(part.float() for part in halves), is_causal=True, enable_gqa=True)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("scoring", ["flashprefill", "row-normalised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_chosen_does_not_get_into_the_output(scoring, dtype, isa):
    query, key, value = (part.to(dtype) for part in inputs(1024, 1024, 2, 1, 64, rows=1))
    rules = Rules(scoring, sink=1, window=1, last=0)
    for wrong in (torch.nan, torch.inf):
        bad, key_of, value_of = slice(300, 310), key.clone(), value.clone()
        key_of[:, :, bad], value_of[:, :, bad] = wrong, wrong
        found = sparse_prefill(query, key_of, value_of, alpha=0.5, rules=rules)
        assert not bool(found.selected[..., 3:, 2].any()) and int(found.selected[..., 3:, :].sum()) > 2 * 2 * 5
        assert bool(found.output[:, :, 384:].isfinite().all())
        assert not bool(found.output[:, :, 310:384].isfinite().any())
        plain = _plain(query, key_of, value_of, rules, torch.full((2,), 0.5), 0.125, [0], None, False)
        assert torch.equal(plain.selected, found.selected)


@pytest.mark.parametrize("how", ["exact", "bf16", "reference"])
def test_what_is_not_selected_is_not_read(how):
    """The heads' lists differ in length, so that what the shorter ones have no block for is not read either."""
    query, key, value = inputs(1024, 1024, 2, 1, 64, rows=1)
    rules = Rules(sink=0, window=1, last=0)

    def select(query, key, layout, scale):
        chosen = torch.zeros(2, layout.tiles, layout.blocks, dtype=torch.bool)
        chosen[1, :, 3] = True
        return chosen

    def output():
        if how == "reference":
            return _plain(query, key, value, rules, torch.ones(2), 0.125, [0], select, False).output
        return sparse_prefill(query, key, value, rules=rules, select=select, precision=how).output

    wanted = output()
    key[:, :, :256], value[:, :, :256] = torch.nan, torch.nan
    got = output()
    assert torch.equal(got[:, :, 256:], wanted[:, :, 256:])
    assert bool(got[:, :, :256].isnan().all())


def test_in_compiled_code():
    query, key, value = inputs(300, 300, 2, 1, 64, rows=1)
    compiled = torch.compile(lambda q: sparse_prefill(q * 2, key, value, alpha=0.5).output + 1, backend="aot_eager")
    wanted = sparse_prefill(query * 2, key, value, alpha=0.5).output + 1
    torch.testing.assert_close(compiled(query), wanted)


def test_a_prompt_in_stretches_is_the_same():
    query, key, value = inputs(1024, 1024, 6, 2, 64, rows=1)
    rules = Rules(sink=1, window=1, last=2)
    whole = sparse_prefill(query, key, value, alpha=0.6, rules=rules)
    first = Rules(sink=1, window=1, last=2, following=512)
    parts = [
        sparse_prefill(query[:, :, :512], key[:, :, :512], value[:, :, :512], alpha=0.6, rules=first),
        sparse_prefill(query[:, :, 512:], key, value, alpha=0.6, rules=rules),
    ]
    assert torch.equal(torch.cat([part.output for part in parts], 2), whole.output)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"alpha": -0.1}, "alpha=-0.1 is not in"),
        ({"alpha": torch.ones(3)}, "each of 4 query heads"),
        ({"alpha": math.nan}, "not in"),
        ({"alpha": math.inf}, "not in"),
        ({"alpha": "0.1"}, "expected a number"),
        ({"alpha": torch.zeros(4, device="meta")}, "expected a number"),
        ({"alpha": None}, "alpha=None"),
        ({part: torch.zeros(1, 2, 64, 16).to(torch.float8_e4m3fn) for part in ("query", "key", "value")}, "16 bits"),
        ({"rules": Rules(size=0)}, "size=0"),
        ({"rules": Rules("given")}, "scoring"),
        ({"rules": Rules(window=1.5)}, "window=1.5"),
        ({"rules": Rules(shared="no")}, "shared='no'"),
        ({"rules": {"size": 64}}, "expected lissom.attention.flash_prefill.Rules"),
        ({"scale": math.nan}, "scale"),
        ({"scale": "1"}, "scale='1'"),
        ({"padding": [65]}, "padding"),
        ({"padding": 3}, "padding=3"),
        ({"padding": [0.5]}, "an integer for each row"),
        ({"precision": "half"}, "precision"),
        ({"select": 3}, "a function"),
        ({"key": torch.zeros(1, 2, 64, 16).numpy()}, "key is of numpy.ndarray"),
        ({"key": torch.zeros(1, 2, 64, 16, device="meta")}, "one device"),
        ({"query": torch.zeros(1, 0, 64, 16)}, "nothing"),
        ({"select": lambda q, k, layout, scale: torch.zeros(1, 1, 1, dtype=torch.bool)}, "select"),
        ({"value": torch.zeros(1, 2, 64, 8)}, "alike"),
        ({"query": torch.zeros(1, 4, 65, 16)}, "does not fit"),
        ({"query": torch.zeros(1, 3, 64, 16)}, "does not fit"),
        ({"query": torch.zeros(1, 4, 64, 16).half()}, "one floating-point dtype"),
        ({"query": torch.zeros(1, 4, 64, 16, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input(change, words):
    query, key, value = inputs(64, 64, 4, 2, 16, rows=1)
    with pytest.raises(UserError, match=words):
        sparse_prefill(**({"query": query, "key": key, "value": value} | change))


TRITON = """
import torch
from lissom.attention.flash_prefill import selection
from lissom.attention.flash_prefill.reference import sparse_attention as reference
from lissom.kernels.blocks import Rules
from lissom.kernels.sparse_attention_triton import block_energies, block_means, sparse_attention
torch.manual_seed(0)
for tokens, entries, heads, kv_heads, size, rules, dtype in (
    (300, 300, 3, 1, 64, Rules("flashprefill", 64, 1, 1, 0), torch.float32),
    (160, 520, 6, 2, 48, Rules("row-normalised", 64, 1, 1, 0, True, True), torch.float32),
    (130, 400, 2, 2, 32, Rules("flashprefill", 128, 0, 2, 1, following=300, corrected=True), torch.float16),
    (1, 129, 4, 4, 16, Rules("flashprefill", 64, 1, 1, 1), torch.bfloat16),
):
    query, key, value = torch.randn(heads, tokens, size), *torch.randn(2, kv_heads, entries, size)
    key = key + torch.randn(kv_heads, -(-entries // 64), size).repeat_interleave(64, 1)[:, :entries]
    key[0, 140:150] = torch.nan  # does not count where blocks are chosen
    query, key, value = (part.to(dtype) for part in (query, key, value))
    layout = rules.layout(tokens, entries, heads // kv_heads)
    wanted = selection.energies(query, key, layout, 0.2)
    middle = selection.means(key, rules.size)
    torch.testing.assert_close(block_means(key, layout), middle, equal_nan=True)
    got = block_energies(query, middle, layout, 0.2)
    torch.testing.assert_close(got, wanted, atol=2e-3 if dtype != torch.float32 else 1e-5, rtol=1e-4)
    alpha = torch.tensor([0.7, 0.0, *[2.0] * 6])[: len(wanted)]
    chosen = selection.with_forced(selection.above(got, alpha), layout)
    alphas = alpha.repeat_interleave(layout.group)
    assert torch.equal(sparse_attention(query, key, value, layout, 0.2, alphas)[2], chosen)
    key = key.nan_to_num(0.5)
    theirs = reference(query, key, value, layout, 0.2, alphas, chosen, True)
    ours = sparse_attention(query, key, value, layout, 0.2, alphas, chosen, True)
    for one, other in zip(ours, theirs):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
print("same")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_triton_is_the_reference():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
    )
    assert done.stdout.strip() == "same", done.stderr


GPU = pytest.mark.skipif(not torch.cuda.is_available() or find_spec("triton") is None, reason="needs a GPU and Triton")


def error(got, wanted):
    """Relative, of the whole tensor; NaN never passes."""
    got, wanted = got.double().cpu(), wanted.double()
    finite = wanted.isfinite()
    assert torch.equal(got.isfinite(), finite)
    return float((got - wanted)[finite].norm() / wanted[finite].norm().clamp(min=1e-9))


@GPU
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_is_the_reference(shape, dtype, tolerance):
    tokens, entries, heads, kv_heads, size, block, shared, scoring, corrected, padding = shape
    parts = [part.to(dtype) for part in inputs(tokens, entries, heads, kv_heads, size)]
    rules, alphas = Rules(scoring, block, 1, 1, 0, shared, corrected), thresholds(heads)
    got = sparse_prefill(*(part.cuda() for part in parts), alpha=alphas, rules=rules, padding=padding, estimate=True)
    wanted = _plain(*parts, rules, alphas, size**-0.5, list(padding), None, True)
    same = (got.selected.cpu() == wanted.selected).float().mean()
    assert same == 1 if dtype == torch.float32 else same > 0.98
    chosen = wanted.selected.cuda()

    def as_wanted(query, key, layout, scale):
        row = next(i for i, part in enumerate(rows) if part.data_ptr() == key.data_ptr())
        return chosen[row, :, : layout.tiles, : layout.blocks]

    on_gpu = [part.cuda() for part in parts]
    rows = [on_gpu[1][i, :, pad:] for i, pad in enumerate(padding)]
    found = sparse_prefill(*on_gpu, rules=rules, padding=padding, select=as_wanted, estimate=True)
    assert error(found.output, wanted.output) < tolerance and error(found.lse, wanted.lse) < tolerance
    assert float((found.dropped.cpu() - wanted.dropped).abs().max()) < tolerance


@GPU
@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 1000, 4096])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_alpha_zero_is_sdpa_on_a_gpu(tokens, group):
    parts = inputs(tokens, tokens, 2 * group, 2, 64, rows=1)
    wanted = F.scaled_dot_product_attention(*(part.double() for part in parts), is_causal=True, enable_gqa=True)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        assert error(sparse_prefill(*(part.to("cuda", dtype) for part in parts), alpha=0.0).output, wanted) < tolerance


@pytest.mark.parametrize("native_kernel", [True, False])
def test_a_tile_without_any_energy_meets_what_is_forced_alone(native_kernel, monkeypatch):
    if not native_kernel:
        monkeypatch.setattr(native, "library", lambda: None)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 200, 64) for _ in range(3))
    key[:, :, 0] = float("nan")  # of the only block that the second tile could choose
    found = sparse_prefill(query, key, value, alpha=2.0, rules=Rules(sink=0, window=1, last=0))
    assert found.selected[0, 0].tolist() == [[True, False], [False, True]]
    assert bool(found.output[0, 0, 128:].isfinite().all())


@pytest.mark.skipif(native.library() is None, reason="no native kernels")
@pytest.mark.parametrize("rules", [Rules(sink=0, window=0, last=0), Rules(sink=1, window=1, last=2, following=300)])
def test_no_window_and_tokens_that_follow(rules):
    query, key, value = inputs(700, 1000, 4, 2, 64, rows=1)
    got = sparse_prefill(query, key, value, alpha=thresholds(4), rules=rules)
    wanted = _plain(query, key, value, rules, thresholds(4), 0.125, [0], None, False)
    assert torch.equal(got.selected, wanted.selected)
    torch.testing.assert_close(got.output, wanted.output, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("avx512_bf16" not in ISAS, reason="no processor that multiplies bf16")
def test_precision_is_what_is_asked_for():
    parts = inputs(400, 400, 2, 1, 64, rows=1)
    exact, rounded = (sparse_prefill(*parts, alpha=0.0, precision=how) for how in ("exact", "bf16"))
    assert not torch.equal(exact.lse, rounded.lse)
    torch.testing.assert_close(exact.lse, rounded.lse, atol=0.05, rtol=0.05)
    halves = [part.bfloat16() for part in parts]
    whole = sparse_prefill(*(part.float() for part in halves), alpha=0.0, precision="exact")
    assert torch.equal(sparse_prefill(*halves, alpha=0.0, precision="exact").lse, whole.lse)


@pytest.mark.skipif(native.library() is None, reason="no native kernels")
def test_choosing_costs_nothing_where_lists_are_given():
    parts = inputs(2048, 2048, 4, 1, 64, rows=1)

    def select(query, key, layout, scale):
        return layout.causal().expand(4, -1, -1)

    choosing, attending = sparse_prefill(*parts, select=select).seconds.tolist()
    assert 0 <= choosing < attending


@pytest.mark.parametrize("native_kernel", [True, False])
def test_energies_that_are_equal_to_the_threshold_are_met(native_kernel, monkeypatch):
    if not native_kernel:
        monkeypatch.setattr(native, "library", lambda: None)
    query, key, value = inputs(512, 512, 1, 1, 64, rows=1)
    found = sparse_prefill(query, torch.zeros_like(key), value, alpha=1.0, rules=Rules(sink=0, window=1, last=0))
    assert torch.equal(found.selected[0, 0], torch.ones(4, 4).tril().bool())
