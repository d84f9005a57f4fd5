"""The weighted h-transform beside what else refines a coarse picture, on one model, each at several strengths.

Guides of six kinds are made of pictures that the model has not seen: some by a measurement that some methods need to
know, some not. Every method draws the same pictures from the same noise, and comes to a frontier of fidelity, how near
to the picture that there was, and quality, how near what it draws lies to real pictures as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lissom.devices.machine import fast_bf16
from lissom.diffusion.demo import Emoji, load_emoji
from lissom.diffusion.demo.pipeline import PixelEditPipeline, to_tokens
from lissom.diffusion.demo.task import scaled
from lissom.diffusion.denoiser import fingerprint
from lissom.diffusion.h_transform import HTransform
from lissom.diffusion.pictures import quiet, rows_of, tiled, to_picture, write_picture
from lissom.evals.editing import loaded, psnr, trained
from lissom.evals.frontier import KernelDistance, area
from lissom.evals.guided_sampling import DPS, ILVR, FlowDPS, Replacement, started
from lissom.evals.guides import GUIDES, Guide, Request, requests
from lissom.evals.journal import Journal, digest
from lissom.evals.judge import Judge, feature_distance, kept_judge
from lissom.evals.stats import Interval
from lissom.train import dit
from lissom.train.dit import DitConfig, Form

STAGES = ("training", "judge", "drawing")
H_VP, H_FLOW, SDEDIT, IMG2IMG = "h, vp", "h, flow", "SDEdit", "img2img"
GUIDE, FREE = "the guide itself", "without a guide"
DETERMINISTIC, STOCHASTIC = "deterministic", "stochastic"
_DRAWS = 100
_SHOWN = 2  # pictures of each kind of guide on the sheet
_ROWS = 50  # pictures that are drawn at a time


@dataclass(frozen=True)
class Size:
    """How much is trained and drawn.

    Attributes:
        form: of the model.
        pictures: of each kind of guide, at most five of each held-out concept.
        steps: of the deterministic sampler, and of the stochastic one.
        stochastic: kinds of guide for which that is tried.
        kinds: of guide, of `GUIDES`.
        judge_steps: of the training of the network that judges.
    """

    form: Form = dit.FULL
    pictures: int = 200
    steps: tuple[int, int] = (12, 100)
    stochastic: tuple[str, ...] = ("low resolution", "missing region")
    kinds: tuple[str, ...] = tuple(GUIDES)
    judge_steps: int = 400


SMALL = Size(
    replace(dit.SMALL, config=replace(dit.SMALL.config, steps=1000)), pictures=60, steps=(10, 50),
    stochastic=("low resolution",), kinds=("low resolution", "missing region", "another style"), judge_steps=300,
)  # fmt: skip
DEFAULT = Size()
PAPER = Size(Form(dit.FULL.shape, DitConfig(steps=200_000, batch_size=256)), 745, (50, 1000), tuple(GUIDES))

Arm = tuple[str, float]
STRENGTHS: dict[str, tuple[float, float, float]] = {  # as many of each, or its frontier would be the larger for it
    H_VP: (1.0, 3.0, 8.0),
    H_FLOW: (0.5, 1.0, 3.0),
    SDEDIT: (0.3, 0.5, 0.7),
    IMG2IMG: (0.3, 0.5, 0.7),
    "ILVR": (0.0, 0.3, 0.6),
    "replacement": (0.0, 0.3, 0.6),
    "FlowDPS": (0.2, 0.5, 1.0),
    "DPS": (0.3, 1.0, 3.0),
}
_STOCHASTIC = (H_VP, H_FLOW, SDEDIT)


def arms_of(how: Guide, sampler: str) -> list[Arm]:
    """Methods and strengths that a kind of guide allows."""
    allowed = [
        method
        for method in STRENGTHS
        if (method != "replacement" or how.known is not None)
        and (method != "ILVR" or how.known is None)
        and (method not in ("FlowDPS", "DPS") or how.measure is not None)
        and (sampler == DETERMINISTIC or method in _STOCHASTIC)
    ]
    return [(GUIDE, 0.0), (FREE, 0.0), *((method, strength) for method in allowed for strength in STRENGTHS[method])]


@torch.no_grad()
def drawn(pipeline: PixelEditPipeline, request: Request, arm: Arm, sampler: str, steps: int, seed: int) -> torch.Tensor:
    """Pictures like `request.target`, by one method at one strength, on the CPU."""
    method, strength = arm
    if method == GUIDE:
        return request.guide
    request, random = request.to(pipeline.device), torch.Generator().manual_seed(seed)
    tokens = to_tokens(request.guide, pipeline.config.patch)
    call: dict[str, Any] = {
        "latents": torch.randn(tokens.shape, generator=random).to(tokens), "num_inference_steps": steps,
    }  # fmt: skip
    how = request.how
    known = None if how.known is None else how.known(request.guide.shape[-1]).to(tokens)
    around: AbstractContextManager[Any] = nullcontext()
    if method in (H_VP, H_FLOW):
        mask = None if known is None else to_picture(known.expand(3, -1, -1) * 2 - 1)
        around = HTransform(strength, "vp" if method == H_VP else "flow")(pipeline, tokens, mask)
    elif method in (SDEDIT, IMG2IMG):
        spent = steps if method == SDEDIT else max(1, round(steps * strength))
        call |= started(tokens, call["latents"], strength, spent)
    elif method == "ILVR":
        around = ILVR(4, strength)(pipeline, request.guide, random)
    elif method == "replacement" and known is not None:
        around = Replacement(strength)(pipeline, request.guide, known, random)
    elif method == "FlowDPS" and how.measure is not None:
        around = FlowDPS(strength)(pipeline, how.measure(request.target), how.measure, random)
    elif method == "DPS" and how.measure is not None:
        around = DPS(strength)(pipeline, how.measure(request.target), how.measure)
    before = pipeline.scheduler
    pipeline.scheduler = type(before).from_config(before.config, stochastic_sampling=sampler == STOCHASTIC)
    try:
        with around, quiet(pipeline), torch.autocast(pipeline.device.type, torch.bfloat16, enabled=fast_bf16()):
            found = pipeline(prompt=list(request.prompts), generator=random, output_type="pt", **call).images
    finally:
        pipeline.scheduler = before
    pictures = found.float() * 2 - 1
    return (pictures if known is None else torch.where(known > 0, request.guide, pictures)).cpu()  # as anyone would


@dataclass(frozen=True)
class Drawn:
    """What one arm drew.

    Attributes:
        psnr: of each picture, in dB.
        distance: of each, of what the judge sees, to the picture that there was.
        features: `[pictures, 128]`, what the judge sees.
    """

    psnr: np.ndarray
    distance: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
        arms: by kind of guide, sampler and arm.
        real: what the judge sees of held-out pictures that were not to be drawn, by kind of guide.
        pictures: file with some of what was drawn.
    """

    size: Size
    arms: dict[tuple[str, str], dict[Arm, Drawn]]
    real: dict[str, np.ndarray]
    pictures: Path

    @cached_property
    def points(self) -> dict[tuple[str, str], dict[Arm, np.ndarray]]:
        """(PSNR, kernel distance) of every arm, `[1 + draws, 2]`: of all pictures, and then of random halves of them,
        the same for all arms."""
        return {(kind, sampler): self._points(kind, sampler) for kind, sampler in self.arms}

    def _points(self, kind: str, sampler: str) -> dict[Arm, np.ndarray]:
        random, arms = np.random.default_rng(0), self.arms[kind, sampler]
        count = len(next(iter(arms.values())).psnr)
        draws = [np.arange(count), *(random.permutation(count)[: count // 2] for _ in range(_DRAWS))]
        found = {}
        for arm, own in arms.items():
            distance = KernelDistance(own.features, self.real[kind])
            found[arm] = np.asarray([(own.psnr[rows].mean(), distance.of(rows)) for rows in draws])
        return found

    def ahead(self, kind: str, sampler: str, ours: str, theirs: str) -> Interval:
        """Area below one method's frontier less that below another's, as a share of the other's.

        Areas reach to the worst fidelity and the worst quality of any arm. The spread over halves of the pictures is
        that of an estimate from all of them.
        """
        points = self.points[kind, sampler]
        corners = np.stack([np.min([own[:, 0] for own in points.values()], 0),
                            np.max([own[:, 1] for own in points.values()], 0)], 1)  # fmt: skip
        areas = {
            method: np.asarray([
                area([tuple(own[draw]) for (name, _), own in points.items() if name == method], tuple(corner))
                for draw, corner in enumerate(corners)
            ])
            for method in (ours, theirs)
        }  # fmt: skip
        gaps = (areas[ours] - areas[theirs]) / max(float(areas[theirs][0]), 1e-9)
        low, high = np.quantile(gaps[1:] - gaps[1:].mean(), [0.025, 0.975])
        return Interval(float(gaps[0]), float(gaps[0] + low), float(gaps[0] + high))


def run(model: str | None, size: Size, journal: Path, progress: Callable[[str, int, int], None]) -> Run:
    """Train and draw; what `journal` and the folder beside it hold is not made again.

    Args:
        model: a trained `PixelEditPipeline` in the place of one that is trained here.
    """
    known = Journal(journal)
    pipeline = None if model is None else loaded(model)
    emoji = load_emoji(size.form.shape.size if pipeline is None else pipeline.config.size)
    source = size.form if pipeline is None else fingerprint(pipeline.transformer)
    place = journal.with_suffix("") / digest(source, size.judge_steps)
    if pipeline is None:
        pipeline = trained(place / "set", size.form, "set", emoji, partial(progress, STAGES[0]))
    judge = kept_judge(emoji, place / "judge.safetensors", size.judge_steps, partial(progress, STAGES[1]))
    wanted = dict(requests(emoji, size.kinds, size.pictures))
    todo = [
        (name, sampler, arm)
        for name, request in wanted.items()
        for sampler in (DETERMINISTIC, STOCHASTIC)
        if sampler == DETERMINISTIC or name in size.stochastic
        for arm in arms_of(request.how, sampler)
    ]
    found: dict[tuple[str, str], dict[Arm, Drawn]] = {}
    for number, (name, sampler, arm) in enumerate(todo):
        steps = size.steps[sampler == STOCHASTIC]
        key = digest(place.name, size.pictures, steps)
        identity = f"{key} {name}/{sampler}/{arm[0]}/{arm[1]:g}"
        if identity not in known:
            known.add(identity, _scores(judge, wanted[name], _all(pipeline, wanted[name], arm, sampler, steps)))
        record = {key: np.asarray(known[identity][key]) for key in ("psnr", "distance", "features")}
        found.setdefault((name, sampler), {})[arm] = Drawn(**record)
        progress(STAGES[2], number + 1, len(todo))
    pictures = place / f"pictures-{digest(size.kinds, size.steps)}.png"
    if not pictures.is_file():
        write_picture(_sheet(pipeline, wanted, size.steps[0]), pictures)
    return Run(size, found, {name: _others(emoji, judge, request) for name, request in wanted.items()}, pictures)


def _sheet(pipeline: PixelEditPipeline, wanted: Mapping[str, Request], steps: int) -> Image.Image:
    """For each kind of guide what every method draws at its middle strength, and the picture that there was."""
    rows, names = [], []
    for name, request in wanted.items():
        some = request.part(slice(_SHOWN))
        allowed = {method for method, _ in arms_of(request.how, DETERMINISTIC)}
        columns = [some.guide] + [
            drawn(pipeline, some, (method, strengths[1]), DETERMINISTIC, steps, 0) if method in allowed else None
            for method, strengths in STRENGTHS.items()
        ]
        columns.append(some.target)
        rows += rows_of(columns, _SHOWN)
        names += [name] * _SHOWN
    headings = [f"{method} {strengths[1]:g}" for method, strengths in STRENGTHS.items()]
    return tiled(rows, ["guide", *headings, "picture"], names, side=96)


@torch.no_grad()
def _others(emoji: Emoji, judge: Judge, request: Request) -> np.ndarray:
    """What the judge sees of held-out pictures that were not to be drawn: a copy of what was is no better for it."""
    held, asked = emoji.concepts(held_out=True).tolist(), set(request.prompts)
    places = [
        (style, own) for style in range(len(emoji.styles)) for own in held if emoji.prompt(own, style) not in asked
    ]
    pictures = torch.stack([emoji.pictures[style, own] for style, own in places])
    return judge.features(scaled(pictures)).numpy()


def _all(pipeline: PixelEditPipeline, request: Request, arm: Arm, sampler: str, steps: int) -> torch.Tensor:
    parts = [slice(first, first + _ROWS) for first in range(0, len(request.target), _ROWS)]
    return torch.cat([drawn(pipeline, request.part(rows), arm, sampler, steps, rows.start) for rows in parts])


@torch.no_grad()
def _scores(judge: Judge, request: Request, found: torch.Tensor) -> dict[str, Any]:
    found = found.clamp(-1, 1)
    seen = judge.features(found)
    return {
        "psnr": psnr(found, request.target).tolist(),
        "distance": feature_distance(seen, judge.features(request.target)).tolist(),
        "features": [[round(value, 4) for value in row] for row in seen.tolist()],
    }
