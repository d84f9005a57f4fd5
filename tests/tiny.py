"""Tiny decoders of several architectures, with random weights large enough that attention is far from uniform."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from lissom.train import new_tokenizer

VOCAB = 128
STUDY_TEXT = "the quick brown fox jumps over the lazy dog while 12 others look on and count to 34; " * 100
_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**_SHAPE, num_hidden_layers=3, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**_SHAPE, num_hidden_layers=3, num_key_value_heads=2),
    "gemma3": lambda: Gemma3TextConfig(
        **_SHAPE,
        num_hidden_layers=4,
        num_key_value_heads=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=64, n_layer=3, n_head=4, vocab_size=VOCAB, n_positions=512, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    ),
    "qwen2": lambda: Qwen2Config(
        **_SHAPE, num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "mistral": lambda: MistralConfig(**_SHAPE, num_hidden_layers=3, num_key_value_heads=2, sliding_window=8),
    "phi3": lambda: Phi3Config(**_SHAPE, num_hidden_layers=3, num_key_value_heads=2),
    "smollm3": lambda: SmolLM3Config(
        **_SHAPE, num_hidden_layers=4, num_key_value_heads=1, no_rope_layer_interval=2, use_sliding_window=False,
    ),
}  # fmt: skip
ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2")
ALL_ARCHITECTURES = tuple(_CONFIGS)  # where only weights matter, which is quick
DECODERS = tuple(name for name in _CONFIGS if name != "gpt2")  # what runs natively


def tiny_model(architecture: str, attn_implementation: str = "sdpa", **changes: object) -> PreTrainedModel:
    """A seeded model of one of `ALL_ARCHITECTURES`, fp32, on the CPU; `changes` are of its config."""
    torch.manual_seed(0)
    config = _CONFIGS[architecture]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():  # biases begin at zero, and norms at one
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.pad_token_id = 0
    return model


def study_material() -> tuple[PreTrainedModel, object]:
    """A model and a tokenizer as studies are given."""
    tokenizer = new_tokenizer([STUDY_TEXT], 300)
    return tiny_model("llama", vocab_size=len(tokenizer)), tokenizer


def random_ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the rounding of fp32, which grows with the largest logit."""
    torch.testing.assert_close(got, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)


class ByteTokenizer:
    """A byte is a token: stands for a tokenizer where a text only has to become ids of the tiny models."""

    def __call__(self, text: str, **options: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[1 + byte % (VOCAB - 1) for byte in text.encode()]])}
