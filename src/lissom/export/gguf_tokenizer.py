"""A tokenizer of transformers as metadata of GGUF: byte-level BPE, and SentencePiece's BPE with byte fallback."""

from __future__ import annotations

import json
import re
from typing import Any

from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from lissom.errors import UserError

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp knows how to split text by names, not by expressions: split, and whether merges are ignored for whole words.
_SPLITS = {
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", True): "llama-bpe",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", False): "smaug-bpe",
    (rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}", False): "qwen2",
}
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER = -1e9  # score of what no merge leads to


def tokenizer_metadata(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Metadata under `tokenizer.`, for a model with `vocab_size` rows in its embedding.

    Raises:
        UserError: llama.cpp has no tokenizer like this one.
    """
    if not tokenizer.is_fast:
        raise UserError(f"A {type(tokenizer).__name__} without the tokenizers library cannot be written as GGUF.")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise UserError(f"A tokenizer of the kind {model['type']} cannot be written as GGUF: expected BPE.")
    tokens, types = _vocabulary(tokenizer, vocab_size)
    steps = _steps(backend["pre_tokenizer"])
    facts: dict[str, Any]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if any(step["type"] == "ByteLevel" for step in steps):
        facts = {"ggml.model": "gpt2", "ggml.pre": _pre(steps, bool(model.get("ignore_merges"))), "ggml.merges": merges}
    elif model.get("byte_fallback"):
        facts = _sentencepiece(tokenizer, tokens, types, merges, model.get("unk_token"))
    else:
        raise UserError("A BPE tokenizer that is neither byte-level nor has byte fallback cannot be written as GGUF.")
    facts |= {"ggml.tokens": tokens, "ggml.token_type": types}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            facts[f"ggml.{key}_token_id"] = number
    ids = tokenizer("a").input_ids
    facts["ggml.add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    facts["ggml.add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        facts["chat_template"] = tokenizer.chat_template
    return facts


def _vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[int]]:
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= vocab_size:
        raise UserError(f"The tokenizer has {max(vocabulary.values()) + 1} tokens, the model {vocab_size}.")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, int(TokenType.NORMAL)
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        types[number] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    return tokens, types


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    return [pre_tokenizer]


def _pre(steps: list[dict[str, Any]], ignore_merges: bool) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text."""
    *before, last = steps
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        kinds = [step["type"] for step in before]
        if last.get("use_regex", True) and not ignore_merges:
            if not kinds:
                return "gpt-2"
            if kinds == ["Digits"] and before[0].get("individual_digits"):
                return "smollm"
        elif kinds == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0]["invert"]:
            name = _SPLITS.get((before[0]["pattern"].get("Regex", ""), ignore_merges))
            if name:
                return name
    kinds = [step["type"] for step in steps]
    raise UserError(f"llama.cpp does not split text as this tokenizer does ({', '.join(kinds)}): it cannot be written.")


def _sentencepiece(
    tokenizer: PreTrainedTokenizerBase, tokens: list[str], types: list[int], merges: list[str], unknown: str | None
) -> dict[str, Any]:
    """SentencePiece joins the neighbours of the best score: a token's score is how early a merge leads to it."""
    scores = dict.fromkeys(tokens, _NEVER)
    for rank, merge in reversed(list(enumerate(merges))):
        scores[merge.replace(" ", "")] = -float(rank)
    for number, token in enumerate(tokens):
        if token == unknown:
            types[number] = int(TokenType.UNKNOWN)
        elif _BYTE.fullmatch(token):
            types[number] = int(TokenType.BYTE)
        elif types[number] == TokenType.USER_DEFINED:
            tokens[number] = token.replace(_SPACE, " ")  # llama.cpp looks for these in the text as it was given
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.scores": [scores.get(token, _NEVER) for token in tokens],
        "ggml.add_space_prefix": first.startswith(_SPACE),
    }
