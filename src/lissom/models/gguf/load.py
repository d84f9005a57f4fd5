"""A GGUF file as a model of transformers, which computes with the file's own blocks or with what they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lissom.errors import UserError
from lissom.kernels.packed import Packed
from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear
from lissom.models.gguf import blocks
from lissom.models.gguf.architecture import Architecture, config_of, heads_of, names, of_file, pair_rows
from lissom.models.gguf.file import GgufFile, Tensor
from lissom.plugin import attach

_Matrix = TypeVar("_Matrix", Packed, torch.Tensor)


def load_packed(
    path: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a file, its linears `PackedLinear` and its embedding `PackedEmbedding`, and its tokenizer.

    Nothing is rounded: every weight is what the file says. Tied embedding and head share one copy. `save_pretrained`
    writes the same matrices, which `from_pretrained` loads after `import lissom`.

    Args:
        dtype: of the activations between layers, of norms and of biases.

    Raises:
        UserError: the file is damaged or foreign, or the architecture or the type of a tensor is not supported.
    """
    file = GgufFile(path)
    return load_model(file, dtype, attn_implementation), load_tokenizer(file)


def load_dense(
    path: str | Path, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """As `load_packed`, with plain modules whose weights are what the blocks stand for, in `dtype`."""
    file = GgufFile(path)
    return load_model(file, dtype, attn_implementation, packed=False), load_tokenizer(file)


def load_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer that a file describes.

    Raises:
        UserError: there is none, or it is of an unknown kind.
    """
    folder, name = str(file.path.resolve().parent), file.path.name
    try:
        # Not AutoTokenizer: that reads the file three times, in seconds.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name)
    except Exception as error:  # of many kinds, also of the Rust part
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(f"{file.path} has no tokenizer that can be used: {reason}") from error
    if file.metadata.get("tokenizer.ggml.pre") == "smollm":  # which transformers takes for GPT-2's
        single = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(single)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(tokenizer) > embedding.shape[0]:
        _drop_invented_tokens(tokenizer, embedding.shape[0])
    return tokenizer


def _drop_invented_tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Remove tokens that the model has no row for: transformers adds GPT-2's <|endoftext|> where a file has none."""
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["id"] < rows]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(facts))


def load_model(
    file: GgufFile, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None, packed: bool = True
) -> PreTrainedModel:
    """The model of a file; see `load_packed` and `load_dense`."""
    architecture, config = of_file(file), config_of(file)
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    known = names(architecture, model, config.num_hidden_layers)
    filler = _Filler(file, architecture, model, dtype, packed)
    with blocks.one_thread():
        for name, module in list(model.named_modules()):
            if name in known:
                filler.fill(name, module, known[name])
    if config.tie_word_embeddings and not packed:
        model.tie_weights()
    elif config.tie_word_embeddings:
        head = PackedLinear.of(model.get_input_embeddings().packed)
        head.shared = True
        model.set_output_embeddings(head)
    _make_buffers(model)
    missing = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if missing:
        raise UserError(f"{file.path} cannot be used: nothing in it is known to be {missing[0]} of the model.")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # as `from_pretrained` marks what it has loaded
    if packed:
        attach(model)
    return model.eval()


class _Filler:
    """Puts the tensors of a file into the modules of a model on the meta device."""

    def __init__(
        self, file: GgufFile, architecture: Architecture, model: PreTrainedModel, dtype: torch.dtype, packed: bool
    ) -> None:
        self.file, self.architecture, self.model, self.dtype, self.packed = file, architecture, model, dtype, packed

    def fill(self, name: str, module: nn.Module, stored: str) -> None:
        """Fill a linear layer or an embedding, or replace it by a packed one; or set the weights of a norm."""
        if isinstance(module, nn.Linear):
            if stored == "output" and self.model.config.tie_word_embeddings:
                return  # it is the embedding
            bias = None if module.bias is None else self._vector(f"{stored}.bias", module.bias.shape)
            if self.packed:
                self.model.set_submodule(name, PackedLinear.of(self._matrix(stored, module, blocks.pack), bias))
                return
            module.weight = nn.Parameter(self._matrix(stored, module, blocks.dense).to(self.dtype))
            if bias is not None:
                module.bias = nn.Parameter(bias)
        elif isinstance(module, nn.Embedding):
            scale = math.sqrt(self.model.config.hidden_size) if self.architecture.scaled_embedding else 1.0
            if self.packed:
                packed = self._matrix(stored, module, blocks.pack)
                self.model.set_submodule(name, PackedEmbedding.of(packed, self.dtype, scale))
                return
            module.weight = nn.Parameter(self._matrix(stored, module, blocks.dense).to(self.dtype))
            if self.architecture.scaled_embedding:
                module.embed_scale = torch.tensor(scale)
        else:
            for part, parameter in list(module.named_parameters(recurse=False)):
                values = self._vector(f"{stored}.{part}", parameter.shape, self.architecture.norm_offset)
                setattr(module, part, nn.Parameter(values))

    def _tensor(self, name: str, shape: tuple[int, ...]) -> tuple[Tensor, torch.Tensor]:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.file.path} has no tensor {name}, which a {self.architecture.name} model needs.")
        if tensor.shape != shape:
            raise UserError(
                f"{self.file.path}: tensor {name} has the shape {list(tensor.shape)}, expected {list(shape)}."
            )
        data = torch.from_numpy(tensor.data)
        heads = heads_of(name.rpartition(".")[0], self.model.config) if self.architecture.paired else 0
        if heads:
            rows = pair_rows(shape[0], heads).argsort()
            data = data[rows] if len(shape) == 2 else data.view(shape[0], -1)[rows].view(1, -1)
        return tensor, data

    def _matrix(self, stored: str, module: Any, read: Callable[[torch.Tensor, Kind], _Matrix]) -> _Matrix:
        tensor, data = self._tensor(f"{stored}.weight", tuple(module.weight.shape))
        try:
            return read(data, tensor.kind)
        except UserError as error:
            raise self._about(tensor, error) from error

    def _vector(self, name: str, shape: tuple[int, ...], offset: float = 0.0) -> torch.Tensor:
        tensor, data = self._tensor(name, tuple(shape))
        try:
            return (blocks.floats(data, tensor.kind).view(shape) - offset).to(self.dtype)
        except UserError as error:
            raise self._about(tensor, error) from error

    def _about(self, tensor: Tensor, error: UserError) -> UserError:
        words = str(error)
        return UserError(f"{self.file.path}: tensor {tensor.name}{' ' if words[0].islower() else ': '}{words}")


def _make_buffers(model: PreTrainedModel) -> None:
    """Make what is computed and not stored: the rotary frequencies."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=model.config))
