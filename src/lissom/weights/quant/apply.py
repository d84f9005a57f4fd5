"""Quantising a model in place: layer by layer, matrix by matrix, each freed as its codes take its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.kernels.packed import check_finite
from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear, replace, skeleton
from lissom.kernels.rounding import GRIDS, Coded, Grid, rtn
from lissom.models import describe_decoder
from lissom.models.calibration import calibration_windows, tokenizer_of
from lissom.models.layerwise import LayerRunner, observing
from lissom.models.linear import linear_layers, require_original, weight_of
from lissom.plugin import attach
from lissom.weights.quant.config import FINE, Quantize
from lissom.weights.quant.gptq import gptq
from lissom.weights.quant.search import search

Progress = Callable[[str, int, int], None]
_WINDOW = 512  # tokens of a calibration window


class Statistics:
    """Mean of x xᵀ (`whole`) or of x² over the inputs `[tokens, in_features]` of a layer."""

    def __init__(self, whole: bool) -> None:
        self.whole, self.rows = whole, 0
        self.sum: torch.Tensor | None = None

    def add(self, inputs: torch.Tensor) -> None:
        """Take in more inputs."""
        new = inputs.T @ inputs if self.whole else inputs.square().sum(0)
        self.sum = new if self.sum is None else self.sum.add_(new)
        self.rows += len(inputs)

    @property
    def mean(self) -> torch.Tensor:
        assert self.sum is not None
        return self.sum / self.rows


def ends(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Embedding and output head, by their names, where they can be packed."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [(n, m) for n, m in model.named_modules() if any(m is w for w in wanted) and skeleton(m, FINE, 32)]


def calibration_ids(
    model: PreTrainedModel, settings: Quantize, tokenizer: PreTrainedTokenizerBase | None
) -> torch.Tensor | None:
    """The windows of text that the method reads, int64 `[windows, tokens]`; None where it reads none.

    Raises:
        UserError: the text is missing or too short, or there is no tokenizer.
    """
    if not settings.needs_text:
        return None
    length = min(_WINDOW, describe_decoder(model).max_position_embeddings)
    tokenizer = tokenizer or tokenizer_of(model)
    return calibration_windows(tokenizer, settings.calibration, settings.calibration_tokens, length)


def quantize(
    model: PreTrainedModel, settings: Quantize, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
) -> PreTrainedModel:
    """See `Quantize.convert`."""
    require_original(model)
    layers = linear_layers(model)
    for name, parameter in model.named_parameters():
        check_finite(parameter, name)
    ids = calibration_ids(model, settings, tokenizer)
    formats = {name: settings.format for layer in layers for name in layer}
    if settings.mixed:
        from lissom.weights.quant.plan import mixed_formats

        assert ids is not None
        formats = mixed_formats(model, settings, layers, ids, progress)
    training = model.training
    model.eval()
    _quantize_layers(model, settings, layers, formats, ids, progress)
    _quantize_ends(model, settings, progress)
    attach(model)
    return model.train(training)


def _quantize_layers(
    model: PreTrainedModel,
    settings: Quantize,
    layers: list[dict[str, nn.Module]],
    formats: dict[str, str],
    ids: torch.Tensor | None,
    progress: Progress,
) -> None:
    runner = None if ids is None or settings.method == "rtn" else LayerRunner(model, ids)
    for number, inside in enumerate(layers):
        progress("layers", number, len(layers))
        statistics: dict[str, Statistics] = {}
        leaders: dict[str, str] = {}
        outputs = []
        if runner is not None:

            def observer(name: str, kept: dict[str, Statistics] = statistics) -> Callable[[torch.Tensor], None]:
                kept[name] = Statistics(whole=settings.method == "gptq")
                return kept[name].add

            with observing(inside, observer) as leaders:
                outputs = runner.outputs(number)
        for name in list(inside):
            module = inside.pop(name)  # nothing keeps the weights once they are replaced
            known = statistics.get(leaders.get(name, ""))
            mean = None if known is None else known.mean
            replace(model, name, coded(weight_of(module), mean, GRIDS[formats[name]], settings).pack())
        if runner is not None:
            # GPTQ makes up for what earlier layers lost; the search's weights are the untouched model's.
            runner.hidden = runner.outputs(number) if settings.method == "gptq" else outputs
    progress("layers", len(layers), len(layers))


def coded(weight: torch.Tensor, mean: torch.Tensor | None, grid: Grid, settings: Quantize) -> Coded:
    """`weight` by the method of `settings`.

    Args:
        mean: of x xᵀ for `gptq`, of x² for `search`; None where the layer never ran, which leaves plain weights.
    """
    group = settings.group_size
    if settings.method == "rtn":
        return rtn(weight, grid, group)
    if mean is None:
        return search(weight, torch.ones(weight.shape[1]), grid, group)
    if settings.method == "gptq":
        return gptq(weight, mean, grid, group, settings.damping, settings.act_order, settings.shrinkage)
    # Inputs that the text does not use may be used by another one.
    return search(weight, mean + settings.damping * mean.mean(), grid, group)


def _quantize_ends(model: PreTrainedModel, settings: Quantize, progress: Progress) -> None:
    """Embedding and head; where they are one tensor they stay one."""
    if settings.head_bits == 16:
        return
    grid = GRIDS[FINE if settings.head_bits == 8 else settings.coarse]
    done: dict[int, tuple[nn.Parameter, str]] = {}  # the weight is kept so that nothing else gets its address
    todo = sorted(ends(model), key=lambda end: not isinstance(end[1], nn.Embedding))
    for number, (name, module) in enumerate(todo):
        progress("embedding and head", number, len(todo))
        address = module.weight.data_ptr()
        if address in done:
            owner = model.get_submodule(done[address][1])
            assert isinstance(owner, PackedEmbedding | PackedLinear)
            replace(model, name, owner.packed, shared=True)
            continue
        done[address] = (module.weight, name)
        weight = weight_of(module)
        round_to = rtn if settings.method == "rtn" else partial(search, importance=torch.ones(weight.shape[1]))
        replace(model, name, round_to(weight, grid=grid, group=settings.group_size).pack())
    progress("embedding and head", len(todo), len(todo))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of everything that `model` saves; shared tensors count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def formats(model: nn.Module) -> dict[str, str]:
    """Format of every packed layer, by name."""
    return {n: m.format for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
