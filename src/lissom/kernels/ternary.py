"""Ternary matrices: -1, 0 and 1 with one scale, times activations that are whole numbers.

A product is `scale / inverse * sum(whole * quants)`. The sum is of whole numbers, so that it is exact in fp32 in any
order, as long as a row has less than 132 000 inputs: every way to compute it gives the same bits.
(Not so PyTorch's product under autocast, which rounds it to 16 bits.)

Both formats keep three codes of 5 bits in a word of 16, and interleave the words of 32 rows:

- `ternary`: a code is three weights, 27 values. 16 / 9 = 1.78 bits per weight.
- `ternary_2_4`: a code is four weights, at most two of which are not zero. There are 32 such values besides all zeros.
  Where the word's lowest bit is 1, code 0 means `+1 0 0 0`. Where it is 0, exactly one of the codes is 0 and means all
  zeros; a word of codes 0, 1, 0 is twelve zeros. Of the few words with two codes that would be 0, the later one is
  written with a second weight of 1, and named in `spills`. 16 / 12 = 1.33 bits per weight, and what spills.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from lissom.errors import UserError

TERNARY, TERNARY_2_4 = "ternary", "ternary_2_4"
ROWS = 32  # rows whose words lie side by side
BLOCK = 16  # rows that share a scale
PER_CODE = {TERNARY: 3, TERNARY_2_4: 4}  # weights
LEAST = 1e-5  # of the largest activation of a token
LARGEST = 127.0  # of a quantised activation
_ZERO = 32  # stands for the code of all zeros, which has no number of its own
_VOID = 1 << 6  # the word of twelve zeros
_ONE, _OTHER, _BOTH = 0, 2, 8  # codes of `+1 0 0 0`, `0 +1 0 0` and `+1 +1 0 0`
_ELSE = 1  # code of what is looked at by nobody


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations as whole numbers, each token with a scale of its own (absmax int8).

    Args:
        x: `[..., features]`.

    Returns:
        Whole numbers from -127 to 127 in fp32 `[..., features]`; and `inverse`, fp32 `[..., 1]`: `x` is about
        `quants / inverse`.
    """
    values = x.detach().float()
    largest = values.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    inverse = torch.full_like(largest, LARGEST) / largest  # a number by a tensor would be rounded twice
    return (values * inverse).round_(), inverse


def whole_product(
    quants: torch.Tensor, inverse: torch.Tensor, whole: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """The product of what `quantize_tokens` returns with `whole` and `scales` as in `product`, fp32 `[..., rows]`."""
    return F.linear(quants, whole).float() * (scales / inverse)


def product(x: torch.Tensor, whole: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of `x` `[..., columns]`, as whole numbers, with `whole` `[rows, columns]`, in plain PyTorch.

    Args:
        whole: -1, 0 and 1 in fp32.
        scales: fp32, one number or `[rows]`.

    Returns:
        `[..., rows]` in the dtype of `x`.
    """
    out = whole_product(*quantize_tokens(x), whole, scales)
    return (out if bias is None else out + bias.float()).to(x.dtype)


@cache
def _states() -> tuple[torch.Tensor, torch.Tensor]:
    """Of `ternary_2_4`: the four weights of each code, all zeros last, int8 `[33, 4]`; and the code of each of the 81
    values that four weights have as digits of base 3, the first the lowest; -1 where it is none."""
    values = [[sign if place == i else 0 for place in range(4)] for i in range(4) for sign in (1, -1)]
    for first in range(4):
        for second in range(first + 1, 4):
            for one in (1, -1):
                for other in (1, -1):
                    values.append([{first: one, second: other}.get(place, 0) for place in range(4)])
    weights = torch.tensor([*values, [0] * 4], dtype=torch.int8)
    codes = torch.full((81,), -1, dtype=torch.int32)
    codes[_digits(weights).long()] = torch.arange(33, dtype=torch.int32)
    return weights, codes


def _digits(whole: torch.Tensor) -> torch.Tensor:
    """The last axis of -1, 0 and 1 as one number of base 3, the first digit the lowest."""
    powers = 3 ** torch.arange(whole.shape[-1], dtype=torch.int32, device=whole.device)
    return ((whole.int() + 1) * powers).sum(-1, dtype=torch.int32)


def words_of(format: str, columns: int) -> int:
    """Words of a row."""
    return -(-columns // (3 * PER_CODE[format]))


def shapes(format: str, rows: int, columns: int, spills: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor; see `Packed`."""
    tiles = -(-rows // ROWS)
    found: dict[str, tuple[tuple[int, ...], torch.dtype]]
    found = {"quants": ((tiles, words_of(format, columns), ROWS, 2), torch.uint8)}
    found["scales"] = ((-(-rows // BLOCK),), torch.float32)
    if format == TERNARY_2_4:
        found["spills"] = ((spills,), torch.int32)
        found["starts"] = ((tiles + 1,), torch.int32)
    return found


def pack(whole: torch.Tensor, scales: torch.Tensor, format: str) -> dict[str, torch.Tensor]:
    """The tensors of a packed matrix.

    Args:
        whole: -1, 0 and 1, of any dtype, `[rows, columns]`.
        scales: one number, or `[rows]`, the same for every 16 rows that are stored together.

    Raises:
        UserError: a weight is something else, a scale is not finite, of four weights two of which may differ from zero
            more do, or 16 rows do not share a scale.
    """
    rows, columns = whole.shape
    per_code = PER_CODE[format]
    if not bool(((whole == 0) | (whole.abs() == 1)).all()) or not bool(torch.isfinite(scales).all()):
        raise UserError("Ternary weights are -1, 0 and 1, and their scales finite: these are not.")
    scales = scales.detach().float().expand(rows) if scales.ndim == 0 else scales.detach().float()
    per_block = F.pad(scales[None], (0, -rows % BLOCK), mode="replicate")[0].unflatten(0, (-1, BLOCK))
    if not bool((per_block == per_block[:, :1]).all()):
        raise UserError(f"Matrices of one layer, with scales of their own, must begin at a multiple of {BLOCK} rows.")
    padded = F.pad(whole.to(torch.int8), (0, -columns % (3 * per_code), 0, -rows % ROWS))
    codes = _digits(padded.unflatten(1, (-1, per_code)))
    tensors = {"scales": per_block[:, 0].contiguous()}
    if format == TERNARY:
        fields = codes.unflatten(1, (-1, 3)).unbind(-1)
        words = fields[0] | fields[1] << 5 | fields[2] << 10
    else:
        codes = _states()[1].to(codes.device)[codes.long()]
        if bool((codes < 0).any()):
            raise UserError("Of four weights that follow each other more than two are not zero: they are not 2:4.")
        codes[rows:] = codes[:, -(-columns // per_code) :] = _ELSE
        in_words = codes.unflatten(1, (-1, 3))
        zeros = in_words == _ZERO
        some, empty = zeros.any(-1, keepdim=True), zeros.all(-1)
        later = zeros & (zeros.cumsum(-1) > 1)
        one = some & (in_words == _ONE)
        tensors["spills"], tensors["starts"] = _spills(((later | one) & ~empty[..., None]).flatten(1))
        coded = in_words.masked_fill(zeros, 0).masked_fill(later, _OTHER).masked_fill(one, _BOTH)
        fields = coded.unbind(-1)
        words = (~some[..., 0] | fields[0] << 1 | fields[1] << 6 | fields[2] << 11).masked_fill(empty, _VOID)
    tiles = words.unflatten(0, (-1, ROWS)).transpose(1, 2)
    quants = torch.stack([tiles & 255, tiles >> 8], -1).to(torch.uint8).contiguous()
    return {"quants": quants, **tensors}


def _spills(hit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of bool `[rows, codes]`, 32 * code + row in its tile of each True, tile by tile and in order; and where those of
    each tile begin."""
    tile, code, row = hit.unflatten(0, (-1, ROWS)).transpose(1, 2).nonzero(as_tuple=True)
    counts = torch.bincount(tile, minlength=len(hit) // ROWS)
    return (ROWS * code + row).int(), F.pad(counts.cumsum(0), (1, 0)).int()


def _spilt(spills: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tile, code and row in its tile of each spill of these tiles, int64."""
    tiles = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    own = spills[int(starts[0]) : int(starts[-1])].long()
    return tiles, own // ROWS, own % ROWS


def check_spills(quants: torch.Tensor, spills: torch.Tensor, starts: torch.Tensor, columns: int) -> None:
    """That spills are what `pack` writes, each once and in order: kernels take their word for it.

    Args:
        quants, spills, starts: of `ternary_2_4`, see `shapes`.

    Raises:
        UserError: they are not.
    """
    ends = (int(starts[0]), int(starts[-1]))
    inside = (spills >= 0) & (spills < ROWS * -(-columns // PER_CODE[TERNARY_2_4]))
    whole = ends == (0, len(spills)) and bool((starts.diff() >= 0).all()) and bool(inside.all())
    tile, code, row = _spilt(spills, starts) if whole else (spills.long(),) * 3
    if not whole or not bool(((spills.diff() > 0) | (tile.diff() > 0)).all()):
        raise UserError("The checkpoint is damaged: its spills are outside their matrix, or out of order.")
    word = quants[tile, code // 3, row].int()
    number = ((word[:, 0] | word[:, 1] << 8) >> (5 * (code % 3) + 1)) & 31
    if not bool(((number == _OTHER) | (number == _BOTH)).all()):
        raise UserError("The checkpoint is damaged: its spills are not those of its codes.")


def whole_of(
    format: str, quants: torch.Tensor, spills: torch.Tensor | None, starts: torch.Tensor | None
) -> torch.Tensor:
    """-1, 0 and 1, int8 `[tiles * 32, words * 9 or 12]`."""
    words = quants[..., 0].int() | quants[..., 1].int() << 8
    words = words.transpose(1, 2).flatten(0, 1)  # [rows, words]
    if format == TERNARY:
        codes = torch.stack([words >> shift & 31 for shift in (0, 5, 10)], -1)
        digits = torch.stack([codes // 3**place % 3 for place in range(3)], -1)
        return (digits - 1).to(torch.int8).flatten(1)
    assert spills is not None and starts is not None
    codes = torch.stack([words >> shift & 31 for shift in (1, 6, 11)], -1)
    zeros = (codes == 0) & (words[..., None] & 1 == 0) | (words == _VOID)[..., None]
    whole = _states()[0].to(codes.device)[codes.masked_fill(zeros, _ZERO).flatten(1).long()]
    tile, code, row = _spilt(spills, starts)
    whole[tile * ROWS + row, code, 1] = 0
    return whole.flatten(1)
