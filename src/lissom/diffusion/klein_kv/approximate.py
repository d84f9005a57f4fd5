"""References of models that were not trained for a cache, kept for some steps: an approximation, which is measured.

Such references see noise and text, so their keys and values change from step to step, mostly slowly. They are taken
from a whole pass and used in the following ones. That needs no code for each family: every joint attention ends in
PyTorch's scaled dot product, where keys and values are taken out of a whole pass and put back into one without
references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from diffusers.hooks import ModelHook
from torch.overrides import TorchFunctionMode

from lissom.diffusion.klein_kv.hooks import KleinKVReport, arguments_of
from lissom.errors import UserError

_RECENT = 2  # passes of a step: with the prompt and with the negative one
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """How a family lays out a pass: text first, then what is drawn, then references.

    Attributes:
        drawn: tokens of what is drawn, of the arguments of a pass.
        without: what changes of the arguments when there are no references.
    """

    drawn: Callable[[dict[str, Any]], int]
    without: Callable[[dict[str, Any], int], dict[str, Any]]


def _flux_drawn(given: dict[str, Any]) -> int:
    ids = given["img_ids"][0] if given["img_ids"].ndim == 3 else given["img_ids"]
    return int((ids[:, 0] == 0).sum())


def _flux_without(given: dict[str, Any], drawn: int) -> dict[str, Any]:
    return {"img_ids": given["img_ids"][..., :drawn, :]}


def _qwen_drawn(given: dict[str, Any]) -> int:
    frames, rows, columns = _first(given["img_shapes"])[0]
    return int(frames * rows * columns)


def _qwen_without(given: dict[str, Any], drawn: int) -> dict[str, Any]:
    return {"img_shapes": [[shapes[0]] for shapes in given["img_shapes"]]}


def _first(shapes: Sequence[Any]) -> Sequence[Any]:
    found: Sequence[Any] = shapes[0]
    return found if isinstance(found, list) else [found]


FAMILIES: dict[type[torch.nn.Module], Family] = {
    FluxTransformer2DModel: Family(_flux_drawn, _flux_without),
    QwenImageTransformer2DModel: Family(_qwen_drawn, _qwen_without),
}


@dataclass
class _Kept:
    """What one whole pass left.

    Attributes:
        request: what it was made with: the arguments but for the time and what is drawn, and the references.
        pairs: keys and values of the references in each attention, `[batch, heads, tokens, head_dim]`.
        time: of the last pass with them.
        age: passes that have used them.
    """

    request: dict[str, Any]
    time: float
    pairs: Pairs = field(default_factory=list)
    age: int = 0


class ApproximateHook(ModelHook):
    """Every `refresh_every` passes with a prompt are one whole pass and others without references.

    Args:
        refresh_every: None: the first pass alone is whole.
    """

    def __init__(self, report: KleinKVReport, family: Family, refresh_every: int | None) -> None:
        super().__init__()
        self.report, self.family, self.refresh_every = report, family, refresh_every
        self.kept: list[_Kept] = []

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A whole pass, or one without references."""
        forward, given = self.fn_ref.original_forward, arguments_of(module, args, kwargs)
        hidden, drawn = given["hidden_states"], self.family.drawn(given)
        count = hidden.shape[1] - drawn
        if count <= 0:
            return forward(**given)
        request = {name: value for name, value in given.items() if name != "timestep"}
        request["hidden_states"] = hidden[:, drawn:]
        tokens = given["encoder_hidden_states"].shape[1] + hidden.shape[1]
        time = float(given["timestep"].flatten()[0])
        known = next((own for own in self.kept if _same(own.request, request)), None)
        begins = known is not None and time > known.time  # time rises where another request does
        if known is None or begins or (self.refresh_every is not None and known.age + 1 >= self.refresh_every):
            kept = _Kept(request, time)
            with _Attentions(tokens, lambda number, key, value: _take(kept.pairs, key, value, count)):
                output = forward(**given)
            if not kept.pairs:
                raise UserError(
                    f"No attention of {type(module).__name__} is PyTorch's own: set the attention backend `native`."
                )
            others = [own for own in self.kept if own is not known]
            self.kept = [*others[1 - _RECENT :], kept]
            self.report.reference_passes += 1
            return output
        known.age, known.time = known.age + 1, time
        changed = given | {"hidden_states": hidden[:, :drawn]} | self.family.without(given, drawn)
        with _Attentions(tokens - count, lambda number, key, value: _put(known.pairs[number], key, value)):
            output = forward(**changed)
        self.report.cached_passes += 1
        if self.report.damage is None:
            whole, ours = _sample(forward(**given))[:, :drawn], _sample(output)
            self.report.damage = float((ours - whole).norm() / whole.norm())
        return output


class _Attentions(TorchFunctionMode):
    """Changes keys and values of every attention over so many tokens.

    Args:
        change: called with the attention's number in the pass, keys and values, and returns what is taken for them.
    """

    def __init__(
        self, tokens: int, change: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        super().__init__()
        self.tokens, self.change, self.number = tokens, change, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        rest = args[len(names) :]
        if given["key"].shape[2] == self.tokens:
            before = given["key"].shape[2]
            given["key"], given["value"] = self.change(self.number, given["key"], given["value"])
            self.number += 1
            more, mask = given["key"].shape[2] - before, given.get("attn_mask")
            if more and mask is not None:
                given["attn_mask"] = F.pad(mask, (0, more), value=True if mask.dtype == torch.bool else 0.0)
        if rest:
            return function(*(given.pop(name) for name in names), *rest, **given)
        return function(**given)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)


def _take(pairs: Pairs, key: torch.Tensor, value: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs.append((key[:, :, -count:].clone(), value[:, :, -count:].clone()))
    return key, value


def _put(
    pair: tuple[torch.Tensor, torch.Tensor], key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([key, pair[0]], 2), torch.cat([value, pair[1]], 2)


def _sample(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output.sample
    return found
