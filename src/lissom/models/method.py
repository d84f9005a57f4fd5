"""What a method offers so that recipes can name it and the search can find it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, Protocol, Self, get_type_hints, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from lissom.errors import UserError

_LONG = 24  # characters of a value: as many as a float may have


@dataclass(frozen=True)
class SearchContext:
    """The job that candidates are wanted for.

    Attributes:
        tokens: tokens that are read before the first question.
        cache_bytes: bytes of the full KV cache after them.
        quick: a short search: two or three candidates of each kind are enough.
        architecture: `model_type` of the model's config.
        weight_bits: bits per weight of the checkpoint as it is, scales included: a GGUF file's blocks may have five.
    """

    tokens: int
    cache_bytes: int
    quick: bool = False
    architecture: str = ""
    weight_bits: float = 32.0


def check_types(method: Any) -> None:
    """Settings of a method must be what its annotations say.

    Raises:
        UserError: one is not.
    """
    for name, adapter in _adapters(type(method)).items():  # type: ignore[arg-type]
        try:
            adapter.validate_python(getattr(method, name), strict=True)
        except ValidationError as error:
            complaint = error.errors()[0]["msg"].removesuffix(".")
            raise UserError(f"{name}={getattr(method, name)!r}: {complaint}.") from error


@cache
def _adapters(kind: Any) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(kind) if field.init}


def changed(method: Any) -> dict[str, Any]:
    """The settings of a method that differ from their defaults."""
    different = {}
    for field in fields(method):
        value = getattr(method, field.name)
        default = None if field.default is MISSING else field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if field.init and value != default:
            different[field.name] = value
    return different


def described(method: Any, words: str, *said: str) -> str:
    """`words`, followed by the settings that differ from their defaults and are not `said` in them: a label that two
    methods share only where they are the same. A long value is a few digits of its digest."""
    texts = {name: str(value) for name, value in changed(method).items() if name not in said}
    others = [f"{name}={text if len(text) <= _LONG else _digest(text)}" for name, text in texts.items()]
    return f"{words} ({', '.join(others)})" if others else words


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


class Method(Protocol):
    """A frozen dataclass of settings, registered as an entry point of the group `lissom.methods`.

    It is used in one of two ways: called with a model it is a context manager inside which the model runs with the
    method, and what it gives may have a `summary()`, a sentence for those who ran a recipe; or it has
    `convert(model, tokenizer=None)`, which changes the weights in place and returns the model.

    A class attribute `runtime = True` says that it is a way to run the model, which all others are measured on top of.
    """

    name: ClassVar[str]

    @classmethod
    def candidates(cls, context: SearchContext) -> Sequence[Self]:
        """Settings worth measuring for a job, the mildest first."""
        ...


class PipelineMethod(Protocol):
    """A frozen dataclass of settings that acts on a pipeline of diffusers, an entry point of `lissom.pipeline_methods`.

    Called with a pipeline, and by name with what it takes of a request, it is a context manager inside which the
    pipeline draws with it.

    Attributes:
        inputs: what it takes of a request beside prompt and references: `guide` and `mask`, or nothing.
    """

    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]

    @classmethod
    def candidates(cls, pipeline: Any, quick: bool = False) -> Sequence[Self]:
        """Settings worth measuring for a pipeline, the mildest first; none where it does not act on it."""
        ...


@runtime_checkable
class Trainable(Protocol):
    """A method that a model is trained for, by `lissom train`. Recipes name the model that comes of it, not the method.

    Like a `Method` it is a frozen dataclass of settings, and an entry point of `lissom.methods`. A model holds one at a
    time: see `lissom.training_plugin`.
    """

    name: ClassVar[str]
    only_fp32: ClassVar[bool]  # whether its layers cannot be loaded in 16 bits

    def convert(self, model: Any) -> Any:
        """Put the layers in, in place, and `mark` the model, so that `from_pretrained` makes them again."""
        ...

    def place(self, model: Any) -> None:
        """The same for a model whose weights are still to be loaded."""
        ...

    def complete(self, model: Any) -> None:
        """Called behind that: fill what the checkpoint did not have."""
        ...

    def training(self, model: Any) -> Training:
        """What is done and logged while a converted model is trained."""
        ...


@runtime_checkable
class Packable(Trainable, Protocol):
    """One whose layers have a packed form."""

    def check_packable(self, model: Any) -> None:
        """Raise a `UserError` where `pack` will not be possible, before long work."""
        ...

    def pack(self, model: Any) -> Any:
        """Turn what was trained into its packed form, in place."""
        ...


class Training(Protocol):
    """What a method that is trained does at each step, and measures of itself."""

    def begin_step(self, done: float) -> None:
        """Called before each step, with the share of the steps that will be done behind it: 1 is the last one."""
        ...

    def parameter_groups(self, model: Any, learning_rate: float, weight_decay: float) -> list[dict[str, Any]] | None:
        """Groups of the optimiser, each with its rate and decay; None: those that any model has."""
        ...

    def measures(self) -> dict[str, float]:
        """What is logged of the method beside the loss, by name."""
        ...
