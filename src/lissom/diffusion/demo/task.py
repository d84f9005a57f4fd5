"""What is asked of the model: a concept in a style, told by words and by pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lissom.diffusion.demo.emoji import Emoji


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    Attributes:
        contents: references that show the concept, each in another style than the wanted one.
        examples: references that show the wanted style, each of another concept.
        words: what the prompt tells: `both`, `style`, `name`, or `none`.
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
    Kind(1, 0, "style", 0.25),
    Kind(0, 1, "name", 0.1),
    Kind(1, 1, "none", 0.2),
    Kind(1, 1, "style", 0.1),
    Kind(1, 2, "none", 0.05),
    Kind(2, 1, "none", 0.05),
    Kind(2, 2, "both", 0.05),
)


@dataclass(frozen=True)
class Batch:
    """Requests of one kind, and what they should give.

    Attributes:
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


def draw(emoji: Emoji, kind: Kind, concepts: Sequence[int], random: np.random.Generator, without: float = 0.0) -> Batch:
    """A request for each of `concepts`, in a style and with references that are drawn.

    Examples of a style are always concepts that are trained on: what is held out is seen only as what to draw.

    Args:
        without: share of the prompts that are left empty, as guidance needs in training.
    """
    known = emoji.concepts(held_out=False).numpy()
    styles, rows, prompts, wanted = len(emoji.styles), [], [], []
    for concept in concepts:
        order = random.permutation(styles)
        style = int(order[0])
        shown = [(int(other), int(concept)) for other in order[1 : 1 + kind.contents]]
        others = random.choice(known[known != concept], kind.examples, replace=False)
        rows.append(shown + [(style, int(other)) for other in others])
        wanted.append((style, int(concept)))
        told = {"both": emoji.prompt(concept, style), "style": emoji.styles[style], "name": emoji.names[concept]}
        prompts.append("" if random.random() < without else told.get(kind.words, ""))
    places = torch.tensor(rows, dtype=torch.long).reshape(len(rows), kind.references, 2)
    style_of, concept_of = torch.tensor(wanted).unbind(1)
    return Batch(
        scaled(emoji.pictures[style_of, concept_of]),
        scaled(emoji.pictures[places[..., 0], places[..., 1]]),
        tuple(prompts),
        concept_of,
        style_of,
    )


def training_batch(emoji: Emoji, size: int, seed: int, step: int, without: float = 0.1) -> Batch:
    """The batch of a step. It depends on seed and step alone: a run that goes on sees what it would have seen."""
    random = np.random.default_rng((seed, step))
    kind = KINDS[random.choice(len(KINDS), p=[kind.share for kind in KINDS])]
    concepts = random.choice(emoji.concepts(held_out=False).numpy(), size, replace=False)
    return draw(emoji, kind, [int(concept) for concept in concepts], random, without)


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """0 to 255 as -1 to 1."""
    return pictures.float() / 127.5 - 1
