"""Needle recall: a number hidden at several depths of texts of several lengths."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.fidelity import answer_ids
from lissom.evals.texts import passages
from lissom.kv.document import document_ids, question_ids

QUESTION = "What is the access code of the archive? Answer with the number."


@dataclass(frozen=True)
class Needle:
    """One trial: `ids` `[1, about length]`, the depth in (0, 1) of the sentence with `code` in them."""

    ids: torch.Tensor
    length: int
    depth: float
    code: str


def needles(
    tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], depths: Sequence[float], seed: int = 0
) -> Iterator[Needle]:
    """One trial for every length and depth, each with its own text and number."""
    draw = random.Random(seed)
    texts = [text for _, text in passages()]
    for length in lengths:
        for depth in depths:
            draw.shuffle(texts)
            words = tokenizer("\n\n".join(texts[: 2 + length // 500]), add_special_tokens=False)["input_ids"][:length]
            paragraphs = tokenizer.decode(words).split("\n\n")
            code = str(draw.randint(10000, 99999))
            paragraphs.insert(round(depth * len(paragraphs)), f"Note: the access code of the archive is {code}.")
            yield Needle(document_ids(tokenizer, "\n\n".join(paragraphs)), length, depth, code)


@torch.no_grad()
def recalls(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needle: Needle,
    cache: Cache,
    new_tokens: int = 16,
) -> bool:
    """Whether the greedy answer holds the number, behind a cache that has read the needle's text."""
    asked = question_ids(tokenizer, QUESTION).to(model.device)
    (ids,) = answer_ids(model, needle.ids.to(model.device), [asked], cache, new_tokens)
    return needle.code in tokenizer.decode(ids[0, asked.shape[1] :], skip_special_tokens=True)
