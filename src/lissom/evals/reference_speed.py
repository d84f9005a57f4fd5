"""What references cost while pictures are drawn: in every step, read once, or read before.

The transformer alone is timed, with Euler steps around it, so that nothing but its passes counts. Its weights are
random, which does not change how long they take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lissom.diffusion.demo import Emoji
from lissom.diffusion.demo.model import Shape, new_pipeline
from lissom.diffusion.demo.pipeline import PixelEditPipeline, positions, text_positions
from lissom.diffusion.klein_kv import KleinKV, ReferenceStore
from lissom.diffusion.klein_kv.cost import cost
from lissom.diffusion.klein_kv.hooks import WarmHook, hooked
from lissom.diffusion.klein_kv.store import Entry
from lissom.diffusion.load import accelerated
from lissom.diffusion.references import prepare, reference_numbers
from lissom.evals.training_steps import rounds_of

FULL, MASKED, THEIRS, CACHED, WARM = "in every step", "in every step, masked", "diffusers", "cached", "warm"
ARMS = (FULL, MASKED, THEIRS, CACHED, WARM)
_WORDS = 12
# 8 million parameters; a picture and each reference are 256 tokens.
SHAPE = Shape(size=64, patch=4, width=256, double=2, single=5, references="set")


@dataclass(frozen=True)
class Setting:
    """How many references there are, how many steps, and how many pictures are drawn at once with them."""

    references: int
    steps: int
    pictures: int = 1

    def __str__(self) -> str:
        batch = f", {self.pictures} pictures" if self.pictures > 1 else ""
        return f"{self.references} reference{'s' * (self.references > 1)}, {self.steps} steps{batch}"


def speeds(
    settings: Sequence[Setting],
    rounds: int,
    shape: Shape = SHAPE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Setting, dict[str, list[float]]]:
    """Seconds of drawing one picture by each of `ARMS`, in interleaved rounds, on the accelerator where there is one.

    Args:
        progress: called with (rounds done, rounds) of all settings.
    """
    pipeline = _pipeline(shape)
    found = {}
    for number, setting in enumerate(settings):
        works = _works(pipeline, setting)
        done = partial(lambda before, done, total: progress(before + done, rounds * len(settings)), number * rounds)
        found[setting] = rounds_of(works, rounds, done)
    return found


def bounds(setting: Setting, shape: Shape = SHAPE) -> dict[str, float]:
    """How many times less there is to compute than with references in every step, by arm."""
    side = (shape.size // shape.patch) ** 2
    own = cost(shape.width, shape.double + shape.single, side + _WORDS, side * setting.references, setting.steps)
    reading = (own.cached - own.warm) / setting.pictures  # once for all of them; diffusers reads for each
    return {CACHED: own.full / (own.warm + reading), THEIRS: own.full / own.cached, WARM: own.full / own.warm}


def _pipeline(shape: Shape) -> PixelEditPipeline:
    pipeline = new_pipeline(shape, random_emoji(1))
    torch.nn.init.normal_(pipeline.transformer.proj_out.weight, std=0.02)
    return accelerated(pipeline)


def random_emoji(size: int, concepts: int = 16) -> Emoji:
    """Pictures of nothing, in two styles, all held out: where only time is measured."""
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, concepts, 3, size, size), generator=random)
    names = tuple(f"word{number}" for number in range(concepts))
    return Emoji(pictures, ("one", "two"), names, ("",) * concepts, torch.ones(concepts, dtype=torch.bool))


def inputs_of(pipeline: PixelEditPipeline, references: int, pictures: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens of pictures, of the references that they share, and of the words of each."""
    config, random, device = pipeline.config, torch.Generator().manual_seed(0), pipeline.device
    side = config.size // config.patch
    channels, width = pipeline.transformer.config.in_channels, pipeline.transformer.config.joint_attention_dim
    found = {
        "noise": torch.randn(pictures, side * side, channels, generator=random),
        "references": (torch.rand(1, references * side * side, channels, generator=random) * 2 - 1).expand(
            pictures, -1, -1
        ),
        "words": torch.randn(pictures, _WORDS, width, generator=random),
        "image_ids": positions(side, side),
        "reference_ids": torch.cat([positions(side, side, place) for place in reference_numbers(references)]),
    }
    return {name: value.to(device) for name, value in found.items()}


@torch.no_grad()
def sampled(
    pipeline: PixelEditPipeline, inputs: Mapping[str, torch.Tensor], steps: int, arm: str
) -> list[torch.Tensor]:
    """What every step leaves.

    Args:
        arm: `FULL`, `MASKED` or `THEIRS`: how references get to the transformer; others as `FULL`, without
            references where they are `WARM`.
    """
    transformer, sample, left = pipeline.transformer, inputs["noise"], []
    both = torch.cat([inputs["reference_ids"], inputs["image_ids"]])
    length = sample.shape[1]
    cache: Any = None
    for step in range(steps):
        given: dict[str, Any] = {
            "hidden_states": torch.cat([inputs["references"], sample], 1),
            "img_ids": both,
            "encoder_hidden_states": inputs["words"],
            "txt_ids": text_positions(inputs["words"].shape[1]).to(sample.device),
            "timestep": sample.new_full((len(sample),), 1 - step / steps),
            "return_dict": False,
        }
        if arm == MASKED or (arm == THEIRS and cache is None):
            given |= {"kv_cache_mode": "extract", "num_ref_tokens": inputs["references"].shape[1]}
        elif arm in (WARM, THEIRS):
            given |= {"hidden_states": sample, "img_ids": inputs["image_ids"]}
        if arm == THEIRS and cache is not None:
            given |= {"kv_cache": cache, "kv_cache_mode": "cached"}
        output = transformer(**given)
        if arm == THEIRS and cache is None:
            cache = output[1]
        sample = sample - output[0][:, -length:] / steps
        left.append(sample)
    return left


def _works(pipeline: PixelEditPipeline, setting: Setting) -> dict[str, Callable[[], Any]]:
    inputs = inputs_of(pipeline, setting.references, setting.pictures)
    warm = read_of(pipeline, inputs)
    prepare(pipeline.transformer)

    def cached() -> None:
        with KleinKV()(pipeline):
            sampled(pipeline, inputs, setting.steps, FULL)

    def at_hand() -> None:
        with hooked(pipeline.transformer, WarmHook(warm)):
            sampled(pipeline, inputs, setting.steps, WARM)

    works: dict[str, Callable[[], Any]] = {
        arm: partial(sampled, pipeline, inputs, setting.steps, arm) for arm in (FULL, MASKED, THEIRS)
    }
    return works | {CACHED: cached, WARM: at_hand}


def read_of(pipeline: PixelEditPipeline, inputs: Mapping[str, torch.Tensor]) -> list[Entry]:
    """The references of `inputs`, read."""
    store = ReferenceStore(2**32)
    with KleinKV(store=store)(pipeline):
        sampled(pipeline, inputs, 1, FULL)
    return store.entries()
