"""Running a decoder layer by layer, so that one layer can be changed before the next one sees its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lissom.errors import UserError
from lissom.models.decoder import decoder_layers


class _Reached(Exception):
    pass


class LayerRunner:
    """Hidden states of several windows of text, on their way through the layers.

    Attributes:
        hidden: per window `[1, tokens, hidden_size]`, what the next layer gets.

    Raises:
        UserError: the model's layers depend on more than the hidden states, so that they cannot run one by one.
    """

    def __init__(self, model: PreTrainedModel, ids: torch.Tensor) -> None:
        """`ids`: int64 `[windows, tokens]`."""
        self.layers = decoder_layers(model)[1]
        # What comes with the hidden states (masks, rotations) is the same for all windows of one length.
        self._settings: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        first, last = self._whole(model, ids[:1], self._settings)
        if len(ids) > 1:
            first, last = self._whole(model, ids[-1:], [])
        for number in range(len(self.layers)):
            first = self._run(number, first)
        if not torch.allclose(first, last, rtol=1e-2, atol=1e-2 * float(last.abs().max())):
            raise UserError(f"The layers of {type(model).__name__} cannot run one by one, which calibration needs.")
        self.hidden = [self._embedded(model, window[None]) for window in ids]

    @torch.no_grad()
    def _whole(
        self, model: PreTrainedModel, ids: torch.Tensor, settings: list[Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of the first and outputs of the last layer; `settings` gets what each layer was called with."""
        ends: list[torch.Tensor] = []

        def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
            hidden, rest = _hidden(args, kwargs)
            settings.append(rest)
            if not ends:
                ends.append(hidden)

        def after(layer: nn.Module, args: Any, output: Any) -> None:
            ends.append(_output(output))

        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in self.layers]
        handles.append(self.layers[-1].register_forward_hook(after))
        try:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return ends[0], ends[-1]

    @torch.no_grad()
    def _embedded(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        def stop(layer: nn.Module, args: Any, kwargs: Any) -> None:
            reached.append(_hidden(args, kwargs)[0])
            raise _Reached

        reached: list[torch.Tensor] = []
        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            model.base_model(input_ids=ids.to(model.device), use_cache=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]

    @torch.no_grad()
    def _run(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self._settings[number]
        return _output(self.layers[number](hidden, *args, **kwargs))

    def outputs(self, number: int) -> list[torch.Tensor]:
        """What layer `number` makes of `hidden`, window by window."""
        return [self._run(number, hidden) for hidden in self.hidden]


def _hidden(args: Any, kwargs: Any) -> tuple[torch.Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The hidden states that a layer is called with, and the rest."""
    if args:
        return args[0], (tuple(args[1:]), dict(kwargs))
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], ((), rest)


def _output(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


Observe = Callable[[torch.Tensor], None]


@contextmanager
def observing(modules: dict[str, nn.Module], observer: Callable[[str], Observe]) -> Iterator[dict[str, str]]:
    """Inside the block, the inputs `[tokens, in_features]` of `modules` go to what `observer(name)` returns.

    Modules with one input (query, key and value) are observed once. Yields, once they ran, by whose name.
    """
    leaders: dict[str, str] = {}
    observers: dict[str, Observe] = {}
    seen: list[tuple[torch.Tensor, str]] = []  # keeps the tensors, so that no other one gets their identity

    def hook(name: str) -> Any:
        def before(module: nn.Module, args: Any) -> None:
            inputs = args[0]
            if name not in leaders:
                leaders[name] = next((other for tensor, other in seen if tensor is inputs), name)
                seen.append((inputs, name))
                if leaders[name] == name:
                    observers[name] = observer(name)
            if name in observers:
                observers[name](inputs.detach().reshape(-1, inputs.shape[-1]).float())

        return before

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield leaders
    finally:
        seen.clear()
        for handle in handles:
            handle.remove()
