"""Long prompts whose last tokens can only be known from far before: a needle, variables, a passage that comes again.

Everything, the answer included, is read in one pass, so that a way to read prompts is judged by what it attends to, and
not by the tokens that are generated afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.evals.texts import passages

_NAMES = ("amber", "birch", "cobalt", "dune", "ember", "fjord", "garnet", "heron", "iris", "jasper", "kelp", "larch")
_SAID_AGAIN = 256  # tokens of a passage that comes twice
_STRETCH = 16  # tokens of it that are one item


@dataclass(frozen=True)
class Trial:
    """One prompt.

    Attributes:
        task: one of `TASKS`.
        length: tokens that were asked for.
        ids: int64 `[tokens]`.
        wanted: int64, places of those that are to be predicted, ascending, in items of `each`.
    """

    task: str
    length: int
    ids: torch.Tensor
    wanted: torch.Tensor
    each: int

    @property
    def items(self) -> int:
        """Number of them."""
        return len(self.wanted) // self.each


class _Writer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, draw: random.Random) -> None:
        self._tokenizer, self.draw = tokenizer, draw
        self._texts = [text for _, text in passages()]

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def prose(self, tokens: int) -> list[int]:
        """Of texts that are put together at random."""
        self.draw.shuffle(self._texts)
        found: list[int] = []
        for text in self._texts:
            if len(found) >= tokens:
                break
            found += self.ids(text.strip() + "\n\n")
        return found[:tokens]

    def hidden(self, head: str, notes: Sequence[str], tail: Sequence[str], task: str, length: int) -> Trial:
        """`notes` in their order at random places of a text between `head` and `tail`, of which every other part is to
        be predicted: one item."""
        parts, begin = [self.ids(f"\n\n{note}\n\n") for note in notes], self.ids(head + "\n\n")
        end, wanted = list[int](), list[int]()
        for number, text in enumerate(tail):
            more = self.ids(text if number else "\n\n" + text)
            wanted += range(len(end), len(end) + len(more)) if number % 2 else ()
            end += more
        prose = self.prose(length - len(begin) - len(end) - sum(map(len, parts)))
        # Not in the latest tokens, which everything attends to.
        places = sorted(self.draw.randrange(len(prose) * 3 // 4) for _ in parts)
        for place, part in reversed(list(zip(places, parts, strict=True))):
            prose[place:place] = part
        places_wanted = torch.tensor(wanted) + length - len(end)
        return Trial(task, length, torch.tensor(begin + prose + end), places_wanted, len(wanted))

    def needle(self, length: int) -> Trial:
        """A number in a text, asked for before and after it."""
        code = self.draw.randint(10000, 99999)
        what = "access code of the archive is"
        return self.hidden(
            f"Somewhere below it is said what the {what}.", [f"Note: the {what} {code}."],
            [f"As said above, the {what}", f" {code}"], "needle", length,
        )  # fmt: skip

    def variables(self, length: int) -> Trial:
        """A name that stands for one of two that have numbers, and its number: both are to be predicted."""
        *names, other = self.draw.sample(_NAMES, 3)
        codes = [self.draw.randint(10000, 99999) for _ in names]
        notes = [f"Note: the number of {name} is {code}." for name, code in zip(names, codes, strict=True)]
        notes.append(f"Note: {other} stands for {names[0]}.")
        self.draw.shuffle(notes)
        tail = [f"Note: {other} stands for", f" {names[0]}", f". Note: the number of {names[0]} is", f" {codes[0]}"]
        return self.hidden("The notes below give names to numbers, and to names.", notes, tail, "variables", length)

    def copy(self, length: int) -> Trial:
        """A passage that comes once more at the end."""
        if length < 3 * _SAID_AGAIN:
            raise ValueError(f"A passage of {_SAID_AGAIN} tokens does not come twice in {length}.")
        text = self.prose(length - _SAID_AGAIN)
        # Some tokens of it lead in, so that it is clear what is said again.
        lead, wanted = _STRETCH, _SAID_AGAIN - _STRETCH
        start = self.draw.randrange(len(text) // 2)
        again = text[start : start + lead + wanted]
        return Trial("copy", length, torch.tensor(text + again), torch.arange(length - wanted, length), _STRETCH)


TASKS: dict[str, Callable[[_Writer, int], Trial]] = {
    "needle": _Writer.needle,
    "variables": _Writer.variables,
    "copy": _Writer.copy,
}


def trials(
    tokenizer: PreTrainedTokenizerBase, task: str, lengths: Sequence[int], each: Sequence[int], seed: int = 0
) -> Iterator[Trial]:
    """`each` trials of every length, shortest first. The same seed gives the same ones."""
    for length, count in zip(lengths, each, strict=True):
        writer = _Writer(tokenizer, random.Random(f"{seed}/{task}/{length}"))
        for _ in range(count):
            yield TASKS[task](writer, length)


@torch.no_grad()
def judged(model: PreTrainedModel, trial: Trial) -> tuple[list[bool], float]:
    """Whether the most probable tokens of each item are the right ones, and the mean NLL in nats of all of them."""
    ids = trial.ids[None].to(model.device)
    places = trial.wanted.to(model.device)
    logits = model(ids, use_cache=False, logits_to_keep=places - 1).logits[0].float()
    wanted = ids[0, places]
    right = (logits.argmax(-1) == wanted).view(trial.items, trial.each).all(1)
    return right.tolist(), float(F.cross_entropy(logits, wanted))
