"""What is asked of the model: a concept in a style, told by words and by pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lissom.diffusion.demo.emoji import Emoji


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        contents: references that show the concept, each in another style than the wanted one; of an edit by a word the
            picture that is edited.
        examples: references that show the wanted style, each of another concept.
        words: what the prompt tells: `both` style and name, `style`, `name`, `none`, or `edit`, one of `EDITS`.
        share: of the training.
    """

    contents: int
    examples: int
    words: str
    share: float

    @property
    def references(self) -> int:
        """Pictures that come with the request."""
        return self.contents + self.examples


KINDS = (
    Kind(0, 0, "both", 0.2),
    Kind(1, 0, "edit", 0.25),
    Kind(1, 0, "style", 0.15),
    Kind(0, 1, "name", 0.05),
    Kind(1, 1, "none", 0.15),
    Kind(1, 1, "style", 0.05),
    Kind(1, 2, "none", 0.05),
    Kind(2, 1, "none", 0.05),
    Kind(2, 2, "both", 0.05),
)
BY_WORD, BY_EXAMPLE = KINDS[1], KINDS[4]
TASKS = {"all": KINDS, "words": (KINDS[0], BY_WORD), "by-word": (BY_WORD,)}
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Batch:
    """Requests of one kind, and what they should give.

    Attributes:
        edits: words of the edits, "" where there is none.
        target: `[batch, 3, size, size]`, -1 to 1.
        references: `[batch, references, 3, size, size]`, -1 to 1.
        prompts: one for each.
        concept, style: `[batch]`, of the target.
    """

    target: torch.Tensor
    references: torch.Tensor
    prompts: tuple[str, ...]
    concept: torch.Tensor
    style: torch.Tensor
    edits: tuple[str, ...]


def draw(emoji: Emoji, kind: Kind, concepts: Sequence[int], random: np.random.Generator, without: float = 0.0) -> Batch:
    """A request for each of `concepts`, in a style and with references that are drawn.

    Examples of a style are always concepts that are trained on: what is held out is seen only as what to draw.

    Args:
        without: share of the prompts that are left empty, as guidance needs in training.
    """
    known = emoji.concepts(held_out=False).numpy()
    styles, rows, prompts, wanted, edits = len(emoji.styles), [], [], [], []
    for concept in concepts:
        order = random.permutation(styles)
        style = int(order[0])
        edits.append(str(random.choice(list(EDITS))) if kind.words == "edit" else "")
        seen = [style] * kind.contents if edits[-1] else order[1 : 1 + kind.contents]
        shown = [(int(own), int(concept)) for own in seen]
        others = random.choice(known[known != concept], kind.examples, replace=False)
        rows.append(shown + [(style, int(other)) for other in others])
        wanted.append((style, int(concept)))
        told = {"both": emoji.prompt(concept, style), "style": emoji.styles[style], "name": emoji.names[concept]}
        words = edits[-1] or told.get(kind.words, "")
        prompts.append("" if random.random() < without and not edits[-1] else words)
    places = torch.tensor(rows, dtype=torch.long).reshape(len(rows), kind.references, 2)
    style_of, concept_of = torch.tensor(wanted).unbind(1)
    targets = scaled(emoji.pictures[style_of, concept_of])
    return Batch(
        torch.stack([edited(picture, word) for picture, word in zip(targets, edits, strict=True)]),
        scaled(emoji.pictures[places[..., 0], places[..., 1]]),
        tuple(prompts),
        concept_of,
        style_of,
        tuple(edits),
    )


def training_batch(
    emoji: Emoji, size: int, seed: int, step: int, without: float = 0.1, kinds: Sequence[Kind] = KINDS
) -> Batch:
    """The batch of a step. It depends on seed and step alone: a run that goes on sees what it would have seen."""
    random, shares = np.random.default_rng((seed, step)), np.asarray([kind.share for kind in kinds])
    kind = kinds[random.choice(len(kinds), p=shares / shares.sum())]
    known = emoji.concepts(held_out=False).numpy()
    concepts = random.choice(known, size, replace=size > len(known))
    return draw(emoji, kind, [int(concept) for concept in concepts], random, without)


def edited(picture: torch.Tensor, word: str) -> torch.Tensor:
    """`[3, size, size]`, -1 to 1, after an edit; "" is none."""
    return EDITS[word](picture) if word else picture


def _grey(picture: torch.Tensor) -> torch.Tensor:
    return (picture * picture.new_tensor(_LUMA)[:, None, None]).sum(0, keepdim=True).expand_as(picture)


EDITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "grey": _grey,
    "mirrored": lambda picture: picture.flip(2),
    "negative": lambda picture: -picture,
}


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """0 to 255 as -1 to 1."""
    return pictures.float() / 127.5 - 1
