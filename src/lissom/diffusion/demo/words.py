"""Words as a diffusion model's conditions: a table with a vector for each, trained with the rest."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

MAX_WORDS = 12
_PAD, _UNKNOWN = "<pad>", "<unknown>"


class WordTable(ModelMixin, ConfigMixin):
    """Vectors of words; what the words mean together is left to the transformer.

    Args:
        vocabulary: words.
        width: entries of a vector.
    """

    @register_to_config
    def __init__(self, vocabulary: int = 2048, width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.table.weight, std=1.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[batch, words]` to `[batch, words, width]`."""
        vectors: torch.Tensor = self.table(ids)
        return vectors


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A token for each word of `texts`; a word of other texts is unknown."""
    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = {word: number for number, word in enumerate([_PAD, _UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, unk_token=_UNKNOWN, model_max_length=MAX_WORDS
    )
