"""A small world for editing with references: emoji of five sets, where the same concept is drawn in five styles.

The task: given pictures of a concept in other styles, of other concepts in the wanted style, and words, draw the
concept in the wanted style; or edit a picture by a word. Some concepts are held out, so that drawing them is never
memory.
"""

from lissom.diffusion.demo.emoji import STYLES, Emoji, load_emoji
from lissom.diffusion.demo.task import BY_EXAMPLE, BY_WORD, EDITS, KINDS, Batch, Kind, draw

__all__ = [
    "BY_EXAMPLE",
    "BY_WORD",
    "EDITS",
    "KINDS",
    "STYLES",
    "Batch",
    "Emoji",
    "Kind",
    "draw",
    "load_emoji",
]
