"""Documents for evaluation that need nothing fetched: the prose of Python's own manual, with planted facts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_NAMES = ("Maren Holt", "Tobias Reyes", "Ada Lindqvist", "Samir Okafor", "Judith Vance", "Pavel Horak", "Ines Duarte")
_CITIES = ("Lisbon", "Tampere", "Cusco", "Galway", "Bergen", "Nairobi", "Kyoto", "Tartu")
_ITEMS = ("a brass compass", "a red bicycle", "a violin", "a glass lantern", "a stone chess set", "a wool coat")
_FOLLOWING = 160  # tokens
_GENERAL = (
    "What is the text mainly about?",
    "What rule does the text explain? Describe it.",
    "Which special cases does the text mention?",
    "Give an example that fits the text.",
)


@dataclass(frozen=True)
class Question:
    """A question about a document; `answer` is the string that a right answer holds, None for open questions."""

    text: str
    answer: str | None = None


@dataclass(frozen=True)
class Document:
    """A text, its held-out questions, and how the text went on where it was cut."""

    name: str
    text: str
    questions: tuple[Question, ...]
    following: str


def passages() -> list[tuple[str, str]]:
    """(name, text) of every long topic of Python's language manual, in a fixed order, light markup removed."""
    from pydoc_data.topics import topics

    cleaned = []
    for name in sorted(topics):
        text = re.sub(r"\*{2,}", "", topics[name])
        text = re.sub(r"\n[\"*=~-]{4,}\n", "\n", text)
        if len(text) > 4000:
            cleaned.append((name, text))
    return cleaned


def planted_documents(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    seed: int = 0,
    source: Iterable[tuple[str, str]] | None = None,
) -> list[Document]:
    """`count` different documents of about `tokens` tokens, each with four planted facts and eight questions.

    The facts stand between paragraphs at depths spread over the document. The same seed gives the same documents.

    Args:
        source: (name, text) to take them from; default `passages()`.

    Raises:
        ValueError: the source has not enough text for so many documents.
    """
    texts = passages() if source is None else list(source)
    draw = random.Random(seed)
    draw.shuffle(texts)
    documents: list[Document] = []
    while len(documents) < count:
        names, body = [], ""
        while _length(tokenizer, body) < tokens + _FOLLOWING:
            if not texts:
                raise ValueError(f"There is text for {len(documents)} documents of {tokens} tokens, not for {count}.")
            name, text = texts.pop()
            names.append(name)
            body += text.strip() + "\n\n"
        ids = tokenizer(body, add_special_tokens=False)["input_ids"]
        paragraphs = tokenizer.decode(ids[:tokens]).split("\n\n")
        following = tokenizer.decode(ids[tokens : tokens + _FOLLOWING])
        facts, questions = _facts(draw)
        for number, fact in enumerate(facts):
            paragraphs.insert(round((number + 0.5) / len(facts) * len(paragraphs)), fact)
        questions += [Question(text) for text in _GENERAL]
        documents.append(Document("+".join(names), "\n\n".join(paragraphs), tuple(questions), following))
    return documents


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _facts(draw: random.Random) -> tuple[list[str], list[Question]]:
    people, city, item = draw.sample(_NAMES, 3), draw.choice(_CITIES), draw.choice(_ITEMS)
    code, year = str(draw.randint(10000, 99999)), str(draw.randint(1950, 1999))
    facts = [
        f"Note: the access code of the archive is {code}.",
        f"Note: {people[0]} was born in {city}.",
        f"Note: {people[1]} inherited {item} from a neighbour.",
        f"Note: {people[2]} opened the workshop in {year}.",
    ]
    questions = [
        Question("What is the access code of the archive?", code),
        Question(f"In which city was {people[0]} born?", city),
        Question(f"What did {people[1]} inherit?", item.split(" ", 1)[1]),
        Question(f"In which year did {people[2]} open the workshop?", year),
    ]
    return facts, questions
