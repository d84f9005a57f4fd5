from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.diffusion.demo import BY_WORD, EDITS, KINDS, Emoji, draw, load_emoji
from lissom.diffusion.demo.emoji import is_held_out
from lissom.diffusion.demo.task import TASKS, training_batch
from lissom.errors import UserError

STYLES, CONCEPTS = 5, 40


@pytest.fixture(scope="module")
def emoji():
    """Every picture is of one colour, which says its style and concept."""
    pictures = torch.zeros(STYLES, CONCEPTS, 3, 16, 16, dtype=torch.uint8)
    pictures[:, :, 0] = torch.arange(STYLES)[:, None, None, None]
    pictures[:, :, 1] = torch.arange(CONCEPTS)[None, :, None, None]
    names = tuple(f"thing {number}" for number in range(CONCEPTS))
    held_out = torch.arange(CONCEPTS) % 10 == 3
    return Emoji(pictures, ("a", "b", "c", "d", "e"), names, ("Things",) * CONCEPTS, held_out)


def shown(pictures):
    """(style, concept) of pictures, `[..., 3, size, size]`."""
    colours = ((pictures[..., 0, 0] + 1) * 127.5).round().long()
    return colours[..., 0], colours[..., 1]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != BY_WORD]),
    seed=st.integers(0, 2**32),
    concept=st.integers(0, CONCEPTS - 1),
)
def test_references_tell_concept_and_style_and_never_give_the_answer(emoji, kind, seed, concept):
    batch = draw(emoji, kind, [concept, 0], np.random.default_rng(seed))
    style, target = shown(batch.target)
    assert torch.equal(style, batch.style) and torch.equal(target, batch.concept) and target[0] == concept
    styles, concepts = shown(batch.references)
    assert styles.shape == (2, kind.references)
    content, example = slice(0, kind.contents), slice(kind.contents, None)
    assert (concepts[:, content] == target[:, None]).all() and (styles[:, content] != style[:, None]).all()
    assert (styles[:, example] == style[:, None]).all() and (concepts[:, example] != target[:, None]).all()
    assert not emoji.held_out[concepts[:, example]].any()
    for row in range(2):
        assert len({*zip(styles[row].tolist(), concepts[row].tolist(), strict=True)}) == kind.references
        words = {"both", "style"} & {kind.words}
        assert (emoji.styles[int(style[row])] in batch.prompts[row].split()) == bool(words)


def test_edits_by_a_word(emoji):
    batch = draw(emoji, BY_WORD, list(range(CONCEPTS)), np.random.default_rng(0), without=0.5)
    assert set(batch.prompts) == set(EDITS) and batch.edits == batch.prompts  # no word is left out
    styles, concepts = shown(batch.references[:, 0])
    assert torch.equal(styles, batch.style) and torch.equal(concepts, torch.arange(CONCEPTS))
    for before, after, word in zip(batch.references[:, 0], batch.target, batch.edits, strict=True):
        light = 0.299 * before[0] + 0.587 * before[1] + 0.114 * before[2]
        wanted = {"grey": light.expand(3, 16, 16), "mirrored": before[:, :, torch.arange(15, -1, -1)],
                  "negative": -before}[word]  # fmt: skip
        torch.testing.assert_close(after, wanted)


def test_a_step_sees_the_same_batch_whenever_it_is_made_and_nothing_that_is_held_out(emoji):
    batches = [training_batch(emoji, 8, seed=1, step=step) for step in range(30)]
    again = training_batch(emoji, 8, seed=1, step=7)
    assert torch.equal(again.target, batches[7].target) and again.prompts == batches[7].prompts
    assert not torch.equal(batches[6].target, batches[7].target)
    for batch in batches:
        assert not emoji.held_out[batch.concept].any() and not emoji.held_out[shown(batch.references)[1]].any()
    empty = [prompt == "" for batch in batches for prompt in batch.prompts]
    assert 0.2 < sum(empty) / len(empty) < 0.8
    assert all(training_batch(emoji, 8, 1, step, kinds=TASKS["by-word"]).edits[0] in EDITS for step in range(9))


def test_shares_of_the_training_are_all_of_it():
    assert sum(kind.share for kind in KINDS) == pytest.approx(1)


def test_concepts_of_one_code_point_are_on_one_side():
    assert is_held_out("1f468-200d-2695") == is_held_out("1f468")
    assert 0.05 < sum(is_held_out(f"{code:x}") for code in range(0x1F300, 0x1F700)) / 0x400 < 0.15


def test_real_pictures():
    emoji = load_emoji(16)
    styles, concepts = emoji.pictures.shape[:2]
    assert styles == len(emoji.styles) and concepts == len(emoji.names) > 1500
    assert 100 < len(emoji.concepts(held_out=True)) < 250
    assert "grinning face" in emoji.names and "Flags" not in emoji.categories
    grey = emoji.pictures[emoji.styles.index("line")].float()
    assert (grey.amax(1) - grey.amin(1)).mean() < 2  # black lines, in which colours are rare
    assert (emoji.pictures[:, :, :, 0, 0] > 200).all(2).float().mean() > 0.8  # corners are white


@pytest.mark.parametrize("size", [8, 65])
def test_sizes_that_pictures_do_not_have(size):
    with pytest.raises(UserError, match="16 to 64"):
        load_emoji(size)
