"""Checkpoints with packed matrices, as `save_pretrained` writes and `from_pretrained` reads them.

`attach(model)` is all that is needed by whatever has put packed layers into a model. The module is imported while
transformers itself is being imported, so it takes the rest of lissom only where it is called.
"""

from __future__ import annotations

import json
import re
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized
from transformers.utils.quantization_config import QuantizationConfigMixin

from lissom.errors import UserError

NAME = "lissom"
_VERSION = 1
_CODES, _SAVED = "quants", "weight"  # name of the codes in memory and in files
_LINE = 64  # bytes of a cache line, which the kernels read at a time


class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json.

    Attributes:
        matrices: format and group size of each packed module, by its name; of `ternary_2_4` the number of spills
            instead, as in `Packed.group`.
        shared: modules that have no tensors of their own but those of another: tied output heads.
        version: of the layout of packed tensors.

    Raises:
        UserError: it was not written by this version of lissom, or it is damaged.
    """

    def __init__(
        self,
        matrices: dict[str, list[Any]] | None = None,
        shared: dict[str, str] | None = None,
        version: int = _VERSION,
        **unknown: Any,
    ) -> None:
        from lissom.kernels.packed import shapes

        self.quant_method = NAME
        self.matrices, self.shared, self.version = matrices or {}, shared or {}, version
        if version != _VERSION:
            raise UserError(f"The checkpoint has packed weights of version {version}; this lissom reads {_VERSION}.")
        for name, entry in self.matrices.items():
            if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], int)):
                raise UserError(f"config.json is damaged: {name} has {entry!r} instead of a format and a number.")
            shapes(entry[0], 1, 256, entry[1])
        if not self.shared.keys() | set(self.shared.values()) <= self.matrices.keys():
            raise UserError("config.json is damaged: a shared matrix is not among the packed ones.")


class PackedQuantizer(HfQuantizer):
    """Puts packed layers in the place of plain ones, for transformers to load the file's tensors into."""

    requires_calibration = True  # a plain model is quantised by `lissom.Quantize`, not while it is loaded

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from lissom.kernels.packed_layers import skeleton

        config, places = self.quantization_config, _places(model, self.quantization_config)
        for name, (format, group) in config.matrices.items():
            if (place := places.get(name)) is not None:
                layer = skeleton(model.get_submodule(place), format, group, model.dtype)
                if layer is None:
                    raise UserError(f"config.json does not fit the model: {place} is no matrix that can be packed.")
                layer.shared = name in config.shared
                model.set_submodule(place, layer)
                parent = model.get_submodule(place.rpartition(".")[0])
                if not any(True for _ in parent.buffers(recurse=False)):
                    parent._is_hf_initialized = True  # GPT-2 initialises its linear layers' weights from above
        _untie(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear

        places = _places(model, self.quantization_config)
        for name, source in self.quantization_config.shared.items():
            if name in places and source in places:
                model.get_submodule(places[name]).hold(model.get_submodule(places[source]).packed)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear | PackedEmbedding):
                for kind, tensor in module.packed.tensors().items():
                    # transformers marks what came from the file; it only warns of what did not.
                    if not getattr(tensor, "_is_hf_initialized", False):
                        raise UserError(f"The checkpoint is damaged: {name}.{kind} is missing.")
                module.packed.check(name)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What is saved, and metadata as long as needed for codes to begin at cache lines.

        In files codes are called `weight`, which has another shape in the plain model: so a process without lissom
        fails to load them, where it would only warn of unknown names and run with random weights.
        """
        # Layers may have been replaced since the model was loaded; transformers writes the config after this.
        self.quantization_config = model.config.quantization_config = _described(model)
        packed = {f"{name}.{_CODES}" for name in self.quantization_config.matrices}
        tensors = {
            name.removesuffix(_CODES) + _SAVED if name in packed else name: tensor
            for name, tensor in model.state_dict().items()
        }
        return tensors, {"padding": _padding(tensors)}

    def get_weight_conversions(self) -> list[Any]:
        """See `HfQuantizer`: packed matrices, and no others, have codes where plain ones have weights."""
        from transformers.core_model_loading import WeightRenaming

        names = "|".join(rf"(?<={re.escape(name)})" for name in self.quantization_config.matrices)
        return [WeightRenaming(rf"(?:{names})\.{_SAVED}$", f".{_CODES}")] if names else []

    def is_serializable(self) -> bool:
        """See `HfQuantizer`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside packed layers can be trained."""
        return True


def attach(model: nn.Module) -> None:
    """Let transformers know that `model` has packed layers: `save_pretrained` then writes them as they are."""
    adopt(model, PackedQuantizer(_described(model)))
    _untie(model)


def adopt(model: nn.Module, quantizer: HfQuantizer) -> None:
    """Let transformers think that it has loaded `model` with `quantizer`, whose config it then saves."""
    _own_config(model)
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    _assign_is_quantized(model)


def _own_config(model: nn.Module) -> None:
    """Give `model` a config that no other model has been made of."""
    copies: dict[int, Any] = {}
    deepcopy(model.config, copies)
    for module in model.modules():
        config = vars(module).get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


def _described(model: nn.Module) -> PackedConfig:
    """The packed layers of `model` as they are. Of those that hold the same tensors one is left to save them."""
    from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear

    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    owners: dict[int | str, str] = {}
    shared: dict[str, str] = {}
    for name, module in sorted(packed.items(), key=lambda item: item[1].shared):
        owner = owners.setdefault(module.quants.data_ptr() or name, name)  # 0 is the meta device
        module.shared = owner != name
        if module.shared:
            shared[name] = owner
    return PackedConfig({name: [module.format, module.group] for name, module in packed.items()}, shared)


def _untie(model: nn.Module) -> None:
    """Packed layers share their tensors themselves; transformers can only tie parameters."""
    from lissom.kernels.packed_layers import PackedLinear

    if isinstance(model.get_output_embeddings(), PackedLinear):
        model._tied_weights_keys = None
        model.all_tied_weights_keys = {}


def _places(model: nn.Module, config: PackedConfig) -> dict[str, str]:
    """Where the packed modules lie in `model`, which may be the same model without its head."""
    known, places = {name for name, _ in model.named_modules()}, {}
    for name in config.matrices:
        found = [place for place in (name, name.removeprefix(f"{model.base_model_prefix}.")) if place in known]
        if found:
            places[name] = found[0]
        elif type(model).__name__ in (model.config.architectures or ()):
            raise UserError(f"config.json does not fit the model: there is no {name}.")
    return places


# safetensors' names of dtypes, in the order in which it writes them.
_DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _padding(tensors: dict[str, torch.Tensor]) -> str:
    """Text that, as metadata, makes safetensors put the first byte of uint8 tensors at a multiple of 64.

    Sizes of packed codes are multiples of 64, and safetensors sorts by dtype. Where the header comes out differently
    (several files, renamed tensors, dtypes that are not known here) the checkpoint is the same, only less aligned.
    """
    if not {tensor.dtype for tensor in tensors.values()} <= _DTYPES.keys():
        return ""
    dtypes = list(_DTYPES)
    order = sorted(tensors, key=lambda name: (dtypes.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "padding": ""}}
    offset = start = 0
    for name in order:
        tensor = tensors[name]
        start = offset if tensor.dtype == torch.uint8 and not start else start
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return " " * (-(8 + length + start) % _LINE)


def _register() -> None:
    from transformers.quantizers import auto  # here: transformers may be in the middle of importing it

    if NAME not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(NAME)(PackedConfig)
        auto.register_quantizer(NAME)(PackedQuantizer)


_register()
