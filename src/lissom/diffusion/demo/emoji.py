"""The pictures: every concept that all five sets have, in each of their styles."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lissom.errors import UserError
from lissom.models import assets
from lissom.models.pictures import NAMES

STYLES = {  # word in prompts: asset
    "google": "emoji-google",
    "twitter": "emoji-twitter",
    "fluent": "emoji-fluent",
    "openmoji": "emoji-openmoji",
    "line": "emoji-openmoji-line",
}
_HELD_OUT = 10  # one base code point of so many
_LEFT_OUT = ("Flags", "Component")  # flags differ little between styles


@dataclass(frozen=True)
class Emoji:
    """Concepts in several styles, on white.

    Attributes:
        pictures: `[styles, concepts, 3, size, size]`, 0 to 255.
        styles: their words in prompts.
        names: of the concepts, in lower case, words with one space between.
        categories: of the concepts.
        held_out: `[concepts]`, those that are not trained on. Concepts of one base code point are on the same side.
    """

    pictures: torch.Tensor
    styles: tuple[str, ...]
    names: tuple[str, ...]
    categories: tuple[str, ...]
    held_out: torch.Tensor

    def concepts(self, held_out: bool) -> torch.Tensor:
        """Numbers of the concepts that are held out, or of the others."""
        return (self.held_out == held_out).nonzero()[:, 0]

    def prompt(self, concept: int, style: int) -> str:
        """What a concept in a style is called: `google grinning face`."""
        return f"{self.styles[style]} {self.names[concept]}"


def load_emoji(size: int, say: Callable[[str], None] = lambda text: None) -> Emoji:
    """All concepts in all styles; fetched where the cache does not have them.

    Args:
        size: pixels of a side, 16 to 64.
        say: told what is fetched.

    Raises:
        UserError: of the size, or the pictures are out of reach.
    """
    if not 16 <= size <= 64:
        raise UserError(f"size={size}: expected 16 to 64 pixels, which is what the pictures have.")
    folders = [assets.path(name, say) for name in STYLES.values()]
    names = json.loads((folders[0] / NAMES).read_text())
    shared = set.intersection(*({file.stem for file in folder.glob("*.png")} for folder in folders))
    codes = sorted(code for code in shared if code in names and names[code]["category"] not in _LEFT_OUT)
    pictures = np.stack([[_picture(folder / f"{code}.png", size) for code in codes] for folder in folders])
    return Emoji(
        torch.from_numpy(pictures),
        tuple(STYLES),
        tuple(_words(names[code]["name"]) for code in codes),
        tuple(names[code]["category"] for code in codes),
        torch.tensor([is_held_out(code) for code in codes]),
    )


def is_held_out(code: str) -> bool:
    """Whether concepts with these code points are kept out of training: by the first one, in every version alike."""
    digest = hashlib.sha256(code.split("-")[0].encode()).digest()
    return int.from_bytes(digest[:8]) % _HELD_OUT == 0


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _picture(file: Path, size: int) -> np.ndarray:
    """`[3, size, size]`, on white."""
    from PIL import Image

    picture = Image.open(file)
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS)).transpose(2, 0, 1)
