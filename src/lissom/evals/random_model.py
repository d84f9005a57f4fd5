"""Models of any size with random weights, for speed alone: no runtime's time depends on what the weights say."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from lissom.export.gguf import export_gguf
from lissom.kernels.packed import GROUP, Packed, pack_codes, pack_ternary
from lissom.kernels.packed_layers import PackedEmbedding, PackedLinear
from lissom.kernels.ternary import PER_CODE, TERNARY
from lissom.models import assets
from lissom.models.gguf import GgufFile
from lissom.models.gguf.load import load_tokenizer

_SPREAD = 0.02  # standard deviation of weights, as models are initialised


def random_matrix(rows: int, columns: int, format: str, random: torch.Generator) -> Packed:
    """A packed matrix: `q4` or `q8` of codes drawn evenly, or ternary with as many zeros as in trained models."""
    if format in PER_CODE:
        # What `lissom check sparse-bitnet` sees: a third rounds to zero; of what a 2:4 mask leaves, a tenth.
        whole = torch.randint(0, 2, (rows, columns), dtype=torch.int8, generator=random).mul_(2).sub_(1)
        dense = format == TERNARY
        whole *= torch.rand(rows, columns, generator=random) > (0.35 if dense else 0.1)
        if not dense:
            order = torch.rand(rows, columns // 4, 4, generator=random).argsort(-1)
            whole.view(rows, -1, 4).scatter_(2, order[..., :2], 0)
        return pack_ternary(whole, torch.tensor(_SPREAD), format)
    top = {"q4": 16, "q8": 256}[format]
    codes = torch.randint(0, top, (rows, columns), dtype=torch.uint8, generator=random)
    # Even draws below n have a standard deviation of n / sqrt(12).
    scales = torch.full((rows, -(-columns // GROUP)), _SPREAD * 12**0.5 / top)
    return pack_codes(codes, scales, None, format)


def random_packed(config: PreTrainedConfig, format: str = "q4", seed: int = 0) -> PreTrainedModel:
    """A model with linears of `format`, and an embedding of 8 bits that is its head, too. It can be exported and saved,
    not run: what is computed and not stored is left out."""
    random = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = random_matrix(config.vocab_size, config.hidden_size, "q8", random)
    for name, module in list(model.named_modules()):
        if module is model.get_output_embeddings():
            model.set_submodule(name, PackedLinear.of(embedding))
        elif isinstance(module, nn.Linear):
            model.set_submodule(
                name, PackedLinear.of(random_matrix(module.out_features, module.in_features, format, random))
            )
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, PackedEmbedding.of(embedding))
        elif "RMSNorm" in type(module).__name__:
            module.weight = nn.Parameter(torch.ones(module.weight.shape))
    return model


def random_llama(layers: int = 16) -> Path:
    """A GGUF file of Llama's shapes, about a billion parameters with 16 layers, in Q4_0 and Q8_0; made once into the
    asset cache, with the tokenizer of SmolLM2."""
    path = assets.cache_dir() / f"random-llama-{layers}" / assets.GGUF_NAME
    if not path.exists():
        known = GgufFile(assets.path("smollm2-135m-gguf") / assets.GGUF_NAME)
        config = LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=8, head_dim=64, vocab_size=known.tensors["token_embd.weight"].shape[0],
            max_position_embeddings=8192, tie_word_embeddings=True,
        )  # fmt: skip
        export_gguf(random_packed(config), load_tokenizer(known), path)
    return path
