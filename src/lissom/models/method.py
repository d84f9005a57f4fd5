"""What a method offers so that recipes can name it and the search can find it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self


@dataclass(frozen=True)
class SearchContext:
    """The job that candidates are wanted for.

    Attributes:
        tokens: tokens that are read before the first question.
        cache_bytes: bytes of the full KV cache after them.
        quick: a short search: two or three candidates of each kind are enough.
    """

    tokens: int
    cache_bytes: int
    quick: bool = False


class Method(Protocol):
    """A frozen dataclass of settings, registered as an entry point of the group `lissom.methods`.

    It is used in one of two ways: called with a model it is a context manager inside which the model runs with the
    method, or it has `convert(model)`, which changes the weights in place and returns the model.
    """

    name: ClassVar[str]

    @classmethod
    def candidates(cls, context: SearchContext) -> Sequence[Self]:
        """Settings worth measuring for a job, the mildest first."""
        ...
