"""Klein KV: that it is exact, what it saves, and what a model needs to be drawn with it.

An ordinary editing model is trained, whose references see everything. A cache is forced on it, and then a short
training makes it cacheable, once of all weights and once of adapters. What each draws of concepts that none has seen is
compared with what there was to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

from lissom.diffusion.demo import Emoji, draw, load_emoji
from lissom.diffusion.demo.model import EditModel, Shape
from lissom.diffusion.demo.pipeline import PixelEditPipeline
from lissom.diffusion.demo.task import TASKS
from lissom.diffusion.denoiser import fingerprint
from lissom.diffusion.klein_kv import KleinKV
from lissom.diffusion.klein_kv.hooks import WarmHook, hooked
from lissom.diffusion.pictures import rows_of, tiled, write_picture
from lissom.errors import UserError
from lissom.evals.editing import KINDS, cacheable, edits, loaded, scores, trained
from lissom.evals.journal import Journal, digest, scope_of
from lissom.evals.judge import kept_judge
from lissom.evals.reference_speed import FULL, MASKED, WARM, Setting, inputs_of, read_of, sampled, speeds
from lissom.evals.stats import Interval, paired_bootstrap
from lissom.train import dit
from lissom.train.dit import DitConfig, Form, held_out_losses

STAGES = ("training", "short training", "adapters", "judge", "editing", "speed")
PLAIN, FORCED, MADE, INT8, LORA = "as trained", "cache forced", "made cacheable", "made cacheable, int8", "by adapters"
_SHOWN = 4  # concepts of each kind of edit on the sheet of pictures
EDITING = (PLAIN, FORCED, MADE, INT8, LORA)


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        form: of the ordinary model.
        short: the training that makes it cacheable.
        rank: of the adapters.
        concepts: that are drawn, at most all that are held out.
        steps: of the sampler.
        judge_steps: of the training of the network that judges.
        settings, rounds: of the timing.
        kinds: of edits that are drawn, of `KINDS`.
    """

    form: Form = dit.FULL
    short: DitConfig = dit.SHORT
    rank: int = 16
    concepts: int = 150
    steps: int = 20
    judge_steps: int = 400
    settings: tuple[Setting, ...] = tuple(
        Setting(count, steps, pictures) for steps, pictures in ((4, 1), (4, 4), (16, 1)) for count in (1, 2, 4)
    )
    rounds: int = 7
    kinds: tuple[str, ...] = tuple(KINDS)


SMALL = Size(
    replace(dit.SMALL, config=replace(dit.SMALL.config, steps=1000, task="by-word")),
    replace(dit.SHORT, task="by-word"),
    kinds=("by a word",), concepts=60, judge_steps=300,
    settings=tuple(Setting(count, 4) for count in (1, 2, 4)), rounds=3,
)  # fmt: skip
DEFAULT = Size()
PAPER = Size(
    Form(Shape(size=64, width=512, double=5, single=20), DitConfig(steps=200_000, batch_size=256)),
    DitConfig(steps=5000, batch_size=256, learning_rate=1e-4),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What was measured.

    Attributes:
        losses: on held-out concepts by number of references, by arm.
        edits: each score of each picture, by kind of edit and arm.
        differences: see `differences`.
        seconds: of drawing a picture, by setting and arm.
        held: bytes of two references, by how they are stored.
        pictures: file with some of what was drawn.
    """

    size: Size
    losses: dict[str, dict[str, float]]
    edits: dict[tuple[str, str], dict[str, np.ndarray]]
    differences: dict[int, float]
    seconds: dict[Setting, dict[str, list[float]]]
    held: dict[str, int]
    pictures: Path

    def score(self, kind: str, arm: str, name: str) -> Interval:
        """Mean of a score."""
        return paired_bootstrap(self.edits[kind, arm][name])

    def gained(self, kind: str, arm: str, name: str) -> Interval:
        """How far a score lies from that of the model as it was trained, on the same requests."""
        return paired_bootstrap(self.edits[kind, arm][name], self.edits[kind, PLAIN][name])


def run(model: str | None, size: Size, journal: Path, progress: Callable[[str, int, int], None]) -> Run:
    """Train, draw and time; what `journal` and the folder beside it hold is not made again.

    Args:
        model: a trained `PixelEditPipeline` of `references="joint"`, in the place of one that is trained here.
    """
    known, here = Journal(journal), journal.with_suffix("")
    given = None if model is None else _ordinary(model)
    emoji = load_emoji(size.form.shape.size if given is None else given.config.size)
    source = size.form if given is None else fingerprint(given.transformer)
    place = here / digest(source, size.short, size.rank, size.judge_steps)
    base = place / "joint" if model is None else Path(model)
    if model is None:
        trained(base, size.form, "joint", emoji, partial(progress, STAGES[0]))
    made = cacheable(place / "set", base, size.short, emoji, partial(progress, STAGES[1]))
    adapters = replace(size.short, learning_rate=dit.ADAPTER_RATE)
    lora = cacheable(place / "lora", base, adapters, emoji, partial(progress, STAGES[2]), size.rank)
    judge = kept_judge(emoji, place / "judge.safetensors", size.judge_steps, partial(progress, STAGES[3]))
    concepts = emoji.concepts(held_out=True).tolist()[: size.concepts]
    plain = _ordinary(base)
    arms: dict[str, tuple[PixelEditPipeline, KleinKV | None]] = {
        PLAIN: (plain, None), FORCED: (plain, KleinKV(force=True)), MADE: (made, KleinKV()),
        INT8: (made, KleinKV(storage="int8")), LORA: (lora, KleinKV()),
    }  # fmt: skip
    found, held = {}, {}
    for number, ((arm, (pipeline, method)), kind) in enumerate(product(arms.items(), size.kinds)):
        identity = f"{digest(place.name, size.concepts, size.steps)} {kind}/{arm}"
        if identity not in known:
            done = partial(_within, partial(progress, STAGES[4]), number, len(arms) * len(size.kinds))
            with nullcontext() if method is None else method(pipeline) as report:
                drawn = edits(pipeline, emoji, KINDS[kind], concepts, size.steps, done)
            bytes_held = 0 if report is None else report.store.nbytes // len(report.store)
            known.add(identity, {"scores": scores(drawn, emoji, KINDS[kind], judge, concepts), "bytes": bytes_held})
        found[kind, arm] = {name: np.asarray(values) for name, values in known[identity]["scores"].items()}
        held[arm] = known[identity]["bytes"]
    identity = f"{place.name} losses"
    if identity not in known:
        pipelines = {PLAIN: plain, MADE: made, LORA: lora}
        asked = TASKS[size.form.config.task]
        known.add(identity, {arm: held_out_losses(EditModel(own), own, emoji, asked) for arm, own in pipelines.items()})
    losses = {arm: known[identity][arm] for arm in (PLAIN, MADE, LORA)}
    identity = f"{scope_of(asdict(size)['settings'], size.rounds)} speed"
    if identity not in known:
        seconds = speeds(size.settings, size.rounds, progress=partial(progress, STAGES[5]))
        known.add(identity, {str(setting): taken for setting, taken in seconds.items()})
    seconds = {setting: known[identity][str(setting)] for setting in size.settings}
    pictures = place / "pictures.png"
    if not pictures.is_file():
        write_picture(_sheet(arms, emoji, concepts[:_SHOWN], size), pictures)
    return Run(size, losses, found, differences(made), seconds, held, pictures)


def _sheet(
    arms: Mapping[str, tuple[PixelEditPipeline, KleinKV | None]], emoji: Emoji, concepts: Sequence[int], size: Size
) -> Image.Image:
    """References, what each arm draws, and what there was to draw."""
    rows, names = [], []
    for name in size.kinds:
        kind = KINDS[name]
        batch = draw(emoji, kind, concepts, np.random.default_rng(0))
        columns = [*batch.references.unbind(1), *[None] * (2 - kind.references)]
        for pipeline, method in arms.values():
            with nullcontext() if method is None else method(pipeline):
                columns.append(edits(pipeline, emoji, kind, concepts, size.steps))
        columns.append(batch.target)
        rows += rows_of(columns, len(concepts))
        names += [f"{name}: {batch.edits[row]}" if batch.edits[row] else name for row in range(len(concepts))]
    return tiled(rows, ["reference", "of a style", *arms, "wanted"], names, side=96)


def _within(progress: Callable[[int, int], None], part: int, parts: int, done: int, total: int) -> None:
    """Progress of one of equal parts."""
    progress(part * total + done, parts * total)


def differences(pipeline: PixelEditPipeline) -> dict[int, float]:
    """Largest difference of any entry in any step between requests with a cache and those without one, by references:
    of one picture, of two at once, and with references that were read before."""
    found = {}
    for references in (1, 2, 3, 4):
        gaps = []
        for pictures in (1, 2):
            inputs = inputs_of(pipeline, references, pictures)
            wanted = sampled(pipeline, inputs, 8, MASKED)
            with KleinKV()(pipeline):
                drawn = [sampled(pipeline, inputs, 8, FULL)]
            with hooked(pipeline.transformer, WarmHook(read_of(pipeline, inputs))):
                drawn.append(sampled(pipeline, inputs, 8, WARM))
            gaps += [float((one - other).abs().max()) for own in drawn for one, other in zip(own, wanted, strict=True)]
        found[references] = max(gaps)
    return found


def _ordinary(model: str | Path) -> PixelEditPipeline:
    pipeline = loaded(model)
    if pipeline.config.references != "joint":
        raise UserError(f"{model}: expected a model of `lissom train-dit --references joint`, or none.")
    return pipeline
