"""A tokenizer of single characters, for models so small that they learn in minutes."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-*/=;:> \n"
_PAD, _END, _UNKNOWN = "<pad>", "<end>", "<unk>"


def character_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each character of the tasks in steps, an end-of-sequence token, and one that stands for all other
    characters. Padding is on the left, as generating needs it."""
    vocabulary = {token: number for number, token in enumerate([_PAD, _END, _UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN, padding_side="left"
    )
