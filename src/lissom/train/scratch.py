"""New models and tokenizers, to train from the beginning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lissom.errors import UserError

_END = "<|endoftext|>"


def new_tokenizer(texts: Iterable[str], vocabulary: int = 4096) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with `vocabulary` tokens, learned from `texts`, with an end-of-sequence token.

    Raises:
        UserError: the vocabulary is smaller than the 256 bytes and the special token.
    """
    if vocabulary < 257:
        raise UserError(f"vocabulary={vocabulary}: expected at least 257, the bytes and the end-of-sequence token.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, bos_token=_END)


def new_model(
    vocabulary: int, hidden: int = 384, layers: int = 6, heads: int = 6, kv_heads: int | None = None,
    intermediate: int | None = None, context: int = 2048, tied: bool = False, biases: bool = False,
    seed: int = 0,
) -> PreTrainedModel:  # fmt: skip
    """A Llama-like decoder with random weights, fp32, of standard deviation sqrt(2 / (5 hidden)) (arXiv 1910.05895).

    Args:
        kv_heads: default: a third of the heads where that divides, otherwise as many.
        intermediate: of the gated MLP; default: 8/3 of `hidden`, up to the next multiple of 96.
        tied: whether embedding and head are one matrix.
        biases: whether linear layers have them.

    Raises:
        UserError: a size is below 1, or the heads do not divide.
    """
    if min(hidden, layers, heads, context) < 1 or min(kv_heads or 1, intermediate or 1) < 1:
        raise UserError(f"hidden={hidden}, layers={layers}, heads={heads}: expected numbers from 1.")
    kv_heads = kv_heads or (heads // 3 if heads % 3 == 0 else heads)
    if hidden % heads or heads % kv_heads:
        raise UserError(f"hidden={hidden}, heads={heads}, kv_heads={kv_heads}: expected each to divide the one before.")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate or -(-8 * hidden // 3 // 96) * 96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
        initializer_range=(0.4 / hidden) ** 0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
