"""Tiny GGUF files of several architectures, written with the reference writer, and damaged ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

Kind = gguf.GGMLQuantizationType
MERGES = ["t h", "Ġ th", "i n", "th e", "Ġth e", "1 2"]
TOKENS = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), "<|end|>"]
_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "vocab_size": len(TOKENS),
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": len(TOKENS) - 1,
    "pad_token_id": None,
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
    "qwen2": lambda: Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_SHAPE | {"head_dim": 128}),
    "smollm3": lambda: SmolLM3Config(**_SHAPE | {"num_hidden_layers": 5}),
    "gemma3": lambda: Gemma3TextConfig(**_SHAPE | {"head_dim": 256, "num_hidden_layers": 6}, sliding_window=8),
    "phi3": lambda: Phi3Config(**_SHAPE),
}
ARCHITECTURES = tuple(_CONFIGS)
_MODULES = {
    "embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "qkv_proj": "attn_qkv",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate_up_proj": "ffn_up",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_GEMMA3_MODULES = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def model_of(architecture: str, **changes) -> PreTrainedModel:
    """A seeded model whose norms and biases are not trivial."""
    torch.manual_seed(0)
    config = _CONFIGS[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    return model


def blocks_of(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """`weight` in blocks of `kind`; of the K formats, which the reference cannot make, random ones instead."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return gguf.quantize(weight, kind)
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(weight.size)
    data = random.integers(0, 256, (weight.shape[0], weight.shape[1] // per_block, size), dtype=np.uint8)
    places = (0, 2) if kind == Kind.Q4_K else (208,)
    for place in places:
        scales = random.uniform(2e-5, 1e-4, data.shape[:2]).astype(np.float16)
        data[..., place : place + 2] = scales[..., None].view(np.uint8)
    return data.reshape(len(data), -1)


def write(
    path: Path,
    model: PreTrainedModel,
    kind: Kind,
    architecture: str,
    leave_out: str = "",
    kinds: Mapping[str, Kind] = MappingProxyType({}),
    **spoilt,
) -> Path:
    """The file of `model` in the manner of llama.cpp's converter.

    Args:
        kind: of all matrices.
        leave_out: name of a tensor that is not written.
        kinds: of other matrices than `kind`, by the name of the module in the model.
        spoilt: raw data by tensor name with `__` for dots.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(len(TOKENS) - 1)
    modules = _MODULES | (_GEMMA3_MODULES if architecture == "gemma3" else {})
    kind_of_all = kind
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        *place, module, part = name.split(".")
        kind = kinds.get(module, kind_of_all)
        layer = next((word for word in place if word.isdigit()), None)
        stored = f"{'' if layer is None else f'blk.{layer}.'}{modules[module]}.{part}"
        values = tensor.numpy()
        if module in ("q_proj", "k_proj") and architecture in ("llama", "smollm3"):
            heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
            rows = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            values = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
        if stored == leave_out:
            continue
        if stored.replace(".", "__") in spoilt:
            writer.add_tensor(stored, spoilt[stored.replace(".", "__")])
        elif values.ndim == 1:
            writer.add_tensor(stored, values + (architecture == "gemma3"))
        elif kind in (Kind.F32, Kind.F16):
            writer.add_tensor(stored, values.astype({Kind.F32: np.float32, Kind.F16: np.float16}[kind]))
        else:
            writer.add_tensor(stored, blocks_of(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
