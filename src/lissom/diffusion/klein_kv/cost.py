"""Floating point operations of drawing with references, by the sizes of a FLUX.2-like transformer.

Blocks of both kinds multiply a token with as many weights: `13 d²`, in a double block `4 d²` for attention and
`9 d²` for a gated MLP of three times the width. Attention takes `4 d` for each pair of a query and a key.
"""

from __future__ import annotations

from dataclasses import dataclass

_WEIGHTS = 13  # of a token in a block, in units of d²


@dataclass(frozen=True)
class Cost:
    """Operations of one picture.

    Attributes:
        full: references are in every step.
        cached: they are read once, with the first step or before it.
        warm: they have been read by an earlier request.
    """

    full: float
    cached: float
    warm: float


def cost(width: int, blocks: int, tokens: int, references: int, steps: int, passes: int = 1) -> Cost:
    """Operations of the blocks in all steps.

    Args:
        width: of the hidden states, d.
        blocks: double and single ones together.
        tokens: of text and picture, L.
        references: tokens of all references, R.
        steps: of the sampler.
        passes: in each of them: 2 with guidance.
    """
    both = tokens + references
    seeing = _linear(width, tokens) + 4.0 * tokens * both * width
    reading = _linear(width, references) + 4.0 * references**2 * width
    runs = blocks * steps * passes
    return Cost(
        runs * (_linear(width, both) + 4.0 * both**2 * width),
        blocks * reading + runs * seeing,
        runs * seeing,
    )


def cached_bytes(width: int, blocks: int, references: int, bytes_per_value: float) -> float:
    """Bytes of the keys and values of `references` tokens."""
    return 2.0 * blocks * references * width * bytes_per_value


def _linear(width: int, tokens: int) -> float:
    return 2.0 * _WEIGHTS * width**2 * tokens
