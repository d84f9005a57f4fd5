"""A model as a GGUF file for llama.cpp: packed weights as they are, others in the type that is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter, LlamaFileType, quantize
from gguf import GGMLQuantizationType as Kind
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.export.gguf_tokenizer import tokenizer_metadata
from lissom.files import atomic_path
from lissom.kernels.packed import Packed, check_finite
from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear
from lissom.kernels.ternary import PER_CODE
from lissom.models.gguf import blocks
from lissom.models.gguf.architecture import (
    Architecture,
    factor_tensors,
    heads_of,
    metadata_of,
    names,
    of_model_type,
    pair_rows,
)
from lissom.models.method import Packable
from lissom.training_plugin import method_in_training

TYPES = ("auto", "f16", "bf16", "q8_0", "q4_0", "q4_1", "tq2_0", "tq1_0")
_OF_DTYPE = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
_FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32, Kind.F16: LlamaFileType.MOSTLY_F16, Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0, Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0, Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    Kind.Q4_K: LlamaFileType.MOSTLY_Q4_K_M, Kind.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    Kind.TQ1_0: LlamaFileType.MOSTLY_TQ1_0, Kind.TQ2_0: LlamaFileType.MOSTLY_TQ2_0,
}  # fmt: skip
_VOCABULARY = ("token_embd", "output")


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: `make` gives its rows, uint8 `[rows, bytes of a row]`, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    make: Callable[[], torch.Tensor]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        per_block, size = GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // per_block * size)


def export_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path, type: str = "auto"
) -> dict[str, int]:
    """Write `model` to `path`, atomically, tensor by tensor.

    Packed layers keep their own type and lose nothing. Norms and biases are F32.

    Ternary matrices are TQ2_0, or TQ1_0 where that is asked for, which have blocks of 256 inputs and lose nothing but
    that scales are rounded to fp16; llama.cpp does not make use of 2:4. With any other type they are written dense, in
    that type.

    Args:
        type: of weights that are not packed: one of `TYPES`. With `auto`, `tq2_0` and `tq1_0` they keep their own
            dtype, which loses nothing. With `q4_0` and `q4_1` the embedding and the head are Q8_0, and matrices that do
            not fill blocks of 32 are F16.

    Returns:
        How many matrices were written in each type.

    Raises:
        UserError: the architecture, a layer, a setting or the tokenizer cannot be written as GGUF.
    """
    if type not in TYPES:
        raise UserError(f"type={type!r}: expected one of {', '.join(TYPES)}.")
    trained = method_in_training(model)
    if trained is not None and not isinstance(trained, Packable):
        raise UserError(
            f"llama.cpp has no place for what {trained.name} adds to layers, and without it the model is another one: "
            "export it as ONNX, or take it out."
        )
    architecture = of_model_type(model.config.model_type)
    metadata = {f"{architecture.name}.{key}": value for key, value in metadata_of(model.config).items()}
    vocabulary = tokenizer_metadata(tokenizer, model.config.vocab_size)
    metadata |= {f"tokenizer.{key}": value for key, value in vocabulary.items()}
    entries = _entries(model, architecture, type)
    kinds = Counter(entry.kind for entry in entries if len(entry.shape) == 2)
    metadata["general.name"] = Path(path).stem
    metadata["general.file_type"] = int(_FILE_TYPES[kinds.most_common(1)[0][0]])
    metadata["general.quantization_version"] = 2
    with atomic_path(path) as temporary:
        _write(temporary, architecture.name, metadata, entries)
    return {kind.name: count for kind, count in kinds.most_common()}


def _entries(model: PreTrainedModel, architecture: Architecture, type: str) -> list[_Entry]:
    known = names(architecture, model, model.config.num_hidden_layers)
    found: list[_Entry] = []
    for name, module in model.named_modules():
        if name in known:
            if name and module is model.get_output_embeddings() and _is_tied(model):
                continue
            found += _of_module(name, module, known[name], model, architecture, type)
        elif next(module.parameters(recurse=False), None) is not None:
            raise UserError(f"{name} ({_kind(module)}) has no place in a GGUF file of a {architecture.name} model.")
    for name, factors in factor_tensors(model.config).items():
        found.append(_vector(name, factors))
    return found


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one tensor, not only equal by the config: a head may be packed by itself."""
    one, other = model.get_input_embeddings(), model.get_output_embeddings()
    part = "quants" if isinstance(one, PackedEmbedding) else "weight"
    first, second = getattr(one, part), getattr(other, part, None)
    return second is not None and first.data_ptr() == second.data_ptr()


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _of_module(
    name: str, module: nn.Module, stored: str, model: PreTrainedModel, architecture: Architecture, type: str
) -> list[_Entry]:
    heads = heads_of(stored, model.config) if architecture.paired else 0

    def order(rows: torch.Tensor) -> torch.Tensor:
        return rows[pair_rows(len(rows), heads)] if heads else rows

    if isinstance(module, PackedLinear | PackedEmbedding) and module.format in PER_CODE:
        found = [_ternary(name, stored, module.packed, type, order)]
    elif isinstance(module, PackedLinear | PackedEmbedding):
        packed = module.packed
        kind, shape = blocks.kind_of(packed), (packed.rows, packed.columns)
        found = [_Entry(f"{stored}.weight", shape, kind, lambda: order(blocks.unpack(packed)))]
    elif _kind(module) == "Linear" or isinstance(module, nn.Embedding):
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        kind = _asked(type, weight, stored)
        found = [
            _Entry(f"{stored}.weight", tuple(weight.shape), kind, lambda: order(_matrix(name, weight.detach(), kind)))
        ]
    elif "norm" in stored:
        return [
            _vector(f"{stored}.{part}", values.detach().float() + architecture.norm_offset)
            for part, values in module.named_parameters(recurse=False)
        ]
    else:
        raise UserError(f"{name} is a {_kind(module)}: only linear, packed and normalisation layers can be written.")
    bias = getattr(module, "bias", None)
    return found if bias is None else [*found, _vector(f"{stored}.bias", order(bias.detach().float()))]


def _ternary(
    name: str, stored: str, packed: Packed, type: str, order: Callable[[torch.Tensor], torch.Tensor]
) -> _Entry:
    shape, place = (packed.rows, packed.columns), f"{stored}.weight"
    if type not in ("auto", "tq2_0", "tq1_0"):
        kind = _asked(type, packed.quants, stored)
        return _Entry(place, shape, kind, lambda: order(_matrix(name, packed.unpack(), kind)))
    kind = Kind.TQ1_0 if type == "tq1_0" else Kind.TQ2_0
    per_block = GGML_QUANT_SIZES[kind][0]
    if packed.columns % per_block:
        raise UserError(
            f"{name} has {packed.columns} inputs: {kind.name} needs a multiple of {per_block}. "
            "llama.cpp has no other ternary type; --type f16 writes the weights dense."
        )
    if packed.scales is not None and float(packed.scales.max()) > torch.finfo(torch.float16).max:
        raise UserError(
            f"{name} has a scale that is too large for the fp16 of {kind.name}: --type bf16 writes it dense."
        )
    return _Entry(place, shape, kind, lambda: order(blocks.ternary_rows(packed, kind)))


def _asked(type: str, weight: torch.Tensor, stored: str) -> Kind:
    if type in ("auto", "tq2_0", "tq1_0"):
        return _OF_DTYPE.get(weight.dtype, Kind.F32)
    kind = Kind[type.upper()]
    if kind in (Kind.Q4_0, Kind.Q4_1) and stored in _VOCABULARY:
        kind = Kind.Q8_0
    return Kind.F16 if weight.shape[1] % GGML_QUANT_SIZES[kind][0] else kind


def _matrix(name: str, weight: torch.Tensor, kind: Kind) -> torch.Tensor:
    check_finite(weight)
    dtype = {stored: dtype for dtype, stored in _OF_DTYPE.items()}.get(kind)
    if dtype is None:
        return torch.from_numpy(quantize(weight.float().cpu().numpy(), kind))
    rounded = weight.to(dtype).cpu().contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise UserError(f"{name} has weights beyond the range of {kind.name}: use --type bf16.")
    return rounded.view(torch.uint8)


def _vector(name: str, values: torch.Tensor) -> _Entry:
    values = values.cpu().contiguous()
    check_finite(values)
    return _Entry(name, tuple(values.shape), Kind.F32, lambda: values.view(torch.uint8))


def _write(path: Path, architecture: str, metadata: dict[str, Any], entries: list[_Entry]) -> None:
    writer = GGUFWriter(None, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif key.endswith("token_type"):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=GGUFValueType.INT32)
        else:
            writer.add_array(key, value)
    for entry in entries:
        raw = np.prod(entry.stored_shape, dtype=np.int64)
        writer.add_tensor_info(entry.name, entry.stored_shape, np.dtype(np.uint8), int(raw), raw_dtype=entry.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with blocks.one_thread():
        for entry in entries:
            writer.write_tensor_data(np.ascontiguousarray(entry.make().numpy()))
    writer.close()
