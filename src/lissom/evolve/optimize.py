"""The main job: measure the untouched model, then candidate recipes, drop the dominated early, keep the front.

The search is a ladder. First how the model runs (native passes, the file's own blocks, dtype, threads), then its
weights in fewer bits, then every other method, each rung on the best of the ones below that spends at most half of the
accepted loss; then the most promising once more on the next best runtime. Each rung measures a little of every
candidate (one document, one timed run), drops what another beats in everything, and measures the rest on the survivors.
At the end the recommended recipe is measured beside other runtimes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import zip_longest
from typing import Any, Literal

import torch

from lissom.devices.meters import interleaved
from lissom.devices.profiles import Profile
from lissom.errors import UserError
from lissom.evals.peers import Comparison
from lissom.evolve.measure import Bench, Measured
from lissom.models.method import Method, SearchContext
from lissom.recipes import Dtype, Recipe, method_class, method_names

logger = logging.getLogger(__name__)

Prefer = Literal["balanced", "speed", "memory"]
Progress = Callable[[str, int, int], None]
# Other runtimes beside the recommended recipe, until a time of `time.monotonic`.
Peers = Callable[[Recipe, float], Comparison]

# Two timings this near to each other are called equal when one candidate is to be dropped for another.
_SAME_TIME = 1.05
ANSWER_TOKENS = 64  # an answer's length in the time that recipes are ranked by
# Of the minutes, what the comparison with other runtimes has at least: a share, and at most so many minutes.
_PEERS_SHARE, _PEERS_MINUTES = 0.4, 2.5


@dataclass
class Outcome:
    """What `optimize` found.

    Attributes:
        base: the untouched model.
        measured: everything that was measured, `base` first.
        front: what nothing else beats in loss, time to the first token, time per token and memory together.
        best: the preferred recipe within the quality floor; `base` where none is.
        max_loss: the quality floor, as a share.
        failed: why a recipe could not be measured, by label.
        untried: labels of recipes that the search did not come to.
        finished: false where the time or a key press ended the search early.
        interrupted: true where it was a key press.
        profile: the device for which it is.
        peers: the recommended recipe beside other runtimes, None where it was not compared.
    """

    base: Measured
    measured: list[Measured]
    max_loss: float
    prefer: Prefer
    profile: Profile
    finished: bool = True
    interrupted: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    untried: list[str] = field(default_factory=list)
    front: list[Measured] = field(default_factory=list)
    peers: Comparison | None = None

    def __post_init__(self) -> None:
        self.front = [m for m in self.measured if not any(dominates(other, m) for other in self.measured)]

    @property
    def best(self) -> Measured:
        within = [m for m in self.front if m.loss.estimate <= self.max_loss]
        if self.prefer == "balanced":  # less memory is no gain where the whole answer takes longer for it
            limit = answer_seconds(self.base, self.profile)
            within = [m for m in within if answer_seconds(m, self.profile) <= limit]
        return max([self.base, *within], key=lambda m: gain(m, self.base, self.prefer, self.profile))


def costs(measured: Measured) -> tuple[float, float, float, float]:
    """What is to be small: quality loss, bytes of weights and cache, seconds to the first token, seconds per token."""
    return measured.loss.estimate, measured.memory, measured.first_token, measured.decode


def dominates(one: Measured, other: Measured, same_time: float = 1.0) -> bool:
    """Whether `one` is nowhere worse than `other` and somewhere better; times within `same_time` count as equal."""
    a, b = costs(one), costs(other)
    no_worse = all(x <= y for x, y in zip(a[:2], b[:2], strict=True))
    no_slower = all(x <= y * same_time for x, y in zip(a[2:], b[2:], strict=True))
    better = a[:2] != b[:2] or any(x * same_time < y for x, y in zip(a[2:], b[2:], strict=True))
    return one is not other and no_worse and no_slower and better


def answer_seconds(measured: Measured, profile: Profile) -> float:
    """Seconds of a whole answer: reading the document and 64 tokens, on the device of `profile`."""
    return profile.first_token(measured) + ANSWER_TOKENS * profile.decode(measured)


def gain(measured: Measured, base: Measured, prefer: Prefer, profile: Profile) -> float:
    """What a recipe wins: the speed-up of a whole answer, the factor on the memory of weights and cache together, or
    the geometric mean of the two."""
    speed = answer_seconds(base, profile) / answer_seconds(measured, profile)
    memory = base.memory / measured.memory
    return {"speed": speed, "memory": memory, "balanced": (speed * memory) ** 0.5}[prefer]


class _OutOfTime(Exception):
    pass


class _Search:
    def __init__(self, bench: Bench, max_loss: float, deadline: float, progress: Progress) -> None:
        self.bench, self.max_loss, self.deadline, self.progress = bench, max_loss, deadline, progress
        self.measured: dict[str, Measured] = {}
        self.failed: dict[str, str] = {}
        self.wanted: dict[str, str] = {}
        self.done, self.planned = 0, 0

    @property
    def base(self) -> Measured:
        """The untouched model, which is measured first."""
        return next(iter(self.measured.values()))

    def run(self, recipes: Sequence[Recipe], drop: bool = True) -> None:
        """One rung for these recipes: a little of each, then the rest of those that are worth it."""
        workload = self.bench.workload
        new = {recipe.identity: recipe for recipe in recipes if recipe.identity not in self.measured}
        whole = workload.documents + workload.rounds
        self.planned += len(new) * whole
        self.wanted |= {identity: recipe.label for identity, recipe in new.items()}
        begun = []
        order = {self.bench.weights(recipe): number for number, recipe in enumerate(new.values())}
        for recipe in sorted(new.values(), key=lambda r: order[self.bench.weights(r)]):  # models are exchanged seldom
            m = Measured(recipe)
            try:
                self._quality(m)
                self._time(m)
            except (UserError, RuntimeError, MemoryError) as error:
                if not self.measured:  # without the untouched model there is nothing to compare with
                    raise
                logger.warning("%s could not be measured: %s", recipe.label, error)
                self.failed[recipe.identity] = str(error)
                continue
            begun.append(m)
            self.measured[recipe.identity] = m
            self._judge()
        alive = [m for m in begun if not (drop and self._hopeless(m))]
        self.planned -= (len(begun) - len(alive)) * (whole - 2)
        self.complete(alive)

    def complete(self, alive: Sequence[Measured]) -> None:
        """Measure what is missing of these: the other documents, and the timed runs."""
        workload, base = self.bench.workload, self.base
        for _ in range(1, workload.documents):
            for m in alive:
                if len(m.quality) < workload.documents:
                    self._quality(m)
        self._judge()
        # The untouched model is timed again beside every group, so that a drifting machine hurts it as much.
        group = {id(m): m for m in (base, *alive)}.values()
        arms = {m.recipe.identity: (lambda m=m: self._time(m)) for m in group}  # type: ignore[misc]
        missing = workload.rounds - min((len(m.timings) for m in alive), default=workload.rounds)
        self.planned += missing * (len(arms) - len(alive))
        for _ in interleaved(arms, missing):
            pass

    def confirm(self, outcome: Outcome) -> Outcome:
        """Measure the recommended recipe fully, in turns with the untouched model, until it stays the recommended one.

        A search that ended early may have put it first for one lucky run.
        """
        deadline, self.deadline = self.deadline, float("inf")
        try:
            for _ in range(3):
                best, workload = outcome.best, self.bench.workload
                if len(best.timings) >= workload.rounds and len(best.quality) >= workload.documents:
                    break
                self.complete([best])
                outcome = self.outcome(outcome.max_loss, outcome.prefer, outcome.profile, outcome.finished)
        finally:
            self.deadline = deadline
        return outcome

    def _quality(self, measured: Measured) -> None:
        self._begin(measured.label)
        measured.quality.append(self.bench.quality(measured.recipe, len(measured.quality)))
        self.done += 1

    def _time(self, measured: Measured) -> None:
        self._begin(measured.label)
        measured.timings.append(self.bench.timing(measured.recipe, len(measured.timings)))
        self.done += 1

    def _begin(self, label: str) -> None:
        """Announce a measurement, unless the time is over and something is known."""
        if self.measured and time.monotonic() > self.deadline:
            raise _OutOfTime
        self.progress(label, self.done, self.planned)

    def outcome(
        self, max_loss: float, prefer: Prefer, profile: Profile, finished: bool = True, interrupted: bool = False
    ) -> Outcome:
        measured = list(self.measured.values())
        known = self.measured.keys() | self.failed.keys()
        return Outcome(
            measured[0],
            measured,
            max_loss,
            prefer,
            profile,
            finished,
            interrupted,
            {self.wanted[identity]: reason for identity, reason in self.failed.items()},
            [label for identity, label in self.wanted.items() if identity not in known],
        )

    def _judge(self) -> None:
        for m in self.measured.values():
            m.loss = self.bench.loss(m.quality, self.base.quality)

    def _hopeless(self, candidate: Measured) -> bool:
        if candidate is self.base:
            return False
        return any(dominates(m, candidate, _SAME_TIME) for m in self.measured.values())


def other_dtype(bench: Bench) -> Dtype:
    """bfloat16, or float32 where the checkpoint's own is bfloat16."""
    return "float32" if bench.own_dtype == torch.bfloat16 else "bfloat16"


def _candidates(kinds: Sequence[type[Method]], context: SearchContext) -> list[Method]:
    """Of all kinds in turns, so that a search that ends early has seen something of each."""
    turns = zip_longest(*(kind.candidates(context) for kind in kinds))
    return [candidate for turn in turns for candidate in turn if candidate is not None]


def runtimes(bench: Bench, natives: Sequence[Method]) -> list[Recipe]:
    """The untouched model first, then other ways to run it: with the file's own blocks where there are some, otherwise
    in its own dtype and in the other one; by each of `natives`, where there are some."""
    settings: list[dict[str, Any]] = [{"weights": "packed"}]
    if not bench.packed:  # passes in native code gain nothing from more than the checkpoint's own bits
        wider = bench.own_dtype == torch.bfloat16 and natives
        settings = [{}] if wider else [{}, {"dtype": other_dtype(bench)}]
    methods: list[list[Method]] = [[native] for native in natives] or [[]]
    found = [Recipe.of(*some, model=bench.base.model, **given) for given in settings for some in methods]
    return [bench.base, *found]


def with_threads(recipe: Recipe) -> list[Recipe]:
    """A recipe with other numbers of threads than all."""
    cores = os.cpu_count() or 1
    counts = sorted({1, max(1, cores // 2)} - {cores, torch.get_num_threads()})
    return [recipe.model_copy(update={"threads": count}) for count in counts]


def on_top(runtime: Recipe, method: Method) -> Recipe:
    """`runtime` with a further method. One that changes weights begins with dense ones, and comes first."""
    facts = runtime.model_dump(exclude={"methods"})
    if hasattr(method, "convert"):
        return Recipe.of(method, *runtime.build(), **(facts | {"weights": "dense"}))
    return Recipe.of(*runtime.build(), method, **facts)


def _climb(search: _Search, quick: bool, prefer: Prefer, profile: Profile) -> None:
    """All rungs."""
    bench, kinds = search.bench, [method_class(key) for key in method_names()]
    running = [kind for kind in kinds if getattr(kind, "runtime", False)]
    weights = [kind for kind in kinds if hasattr(kind, "convert") and kind not in running]
    others = [kind for kind in kinds if kind not in running + weights]

    def best(among: Sequence[Measured]) -> Measured:
        # Half, so that something is left for what comes on top.
        good = [m for m in among if m.loss.estimate <= search.max_loss / 2]
        return max(good or [search.base], key=lambda m: gain(m, search.base, prefer, profile))

    def everything() -> list[Measured]:
        return list(search.measured.values())

    search.run(runtimes(bench, _candidates(running, bench.context(0, quick))))
    search.run(with_threads(best(everything()).recipe))
    ground = everything()
    runtime = best(ground)
    search.run([on_top(runtime.recipe, c) for c in _candidates(weights, bench.context(runtime.cache_bytes, quick))])
    bottom, begun = best(everything()), len(search.measured)
    search.run([on_top(bottom.recipe, c) for c in _candidates(others, bench.context(bottom.cache_bytes, quick))])
    # The promising ones once more on the next best runtime.
    other = best([m for m in ground if m is not runtime and not m.recipe.threads])
    if other is search.base and runtime.recipe.methods:
        return
    changed = other.recipe.model_copy(update={"threads": runtime.recipe.threads})
    changed = reduce(on_top, bottom.recipe.halves()[0].build(), changed)
    front = search.outcome(search.max_loss, prefer, profile).front
    added = [m for m in everything()[begun:] if m.loss.estimate <= 2 * search.max_loss]
    promising = [m for m in added if any(m is kept for kept in front)]
    promising.sort(key=lambda m: gain(m, search.base, prefer, profile), reverse=True)
    search.run([on_top(changed, m.recipe.build()[-1]) for m in promising[: 1 if quick else 3]])


def optimize(
    bench: Bench,
    max_loss: float,
    minutes: float,
    *,
    prefer: Prefer = "balanced",
    quick: bool = False,
    profile: Profile | None = None,
    peers: Peers | None = None,
    progress: Progress = lambda label, done, planned: None,
) -> Outcome:
    """Search recipes for the bench's model. Whatever ends it early, what was measured is returned.

    Args:
        max_loss: quality loss that is accepted, as a share (see `Measured.loss`).
        minutes: after which nothing new is begun, the comparison with `peers` included.
        quick: fewer candidates.
        peers: compares the recommended recipe with other runtimes; only where times are measured, not predicted.
        progress: called with (label, measurements done, planned).
    """
    profile = profile or Profile.this()
    peers = peers if profile.measured else None
    deadline = time.monotonic() + 60 * minutes
    reserve = min(_PEERS_SHARE * minutes, _PEERS_MINUTES) if peers else 0.0
    search = _Search(bench, max_loss, deadline - 60 * reserve, progress)
    finished, interrupted = True, False
    try:
        _climb(search, quick, prefer, profile)
    except _OutOfTime:
        finished = False
    except KeyboardInterrupt:
        finished, interrupted = False, True
    if not search.measured:
        raise KeyboardInterrupt
    outcome = search.outcome(max_loss, prefer, profile, finished, interrupted)
    if interrupted:
        return outcome
    try:
        outcome = search.confirm(outcome)
        _measure_memory(search, outcome, everything=finished and not quick)
        if peers:
            outcome.peers = peers(outcome.best.recipe, deadline)
    except KeyboardInterrupt:
        outcome.finished, outcome.interrupted = False, True
    return outcome


def _measure_memory(search: _Search, outcome: Outcome, everything: bool) -> None:
    """Peak memory of the untouched model and the best recipe, and of the front while there is time."""
    others = outcome.front if everything else []
    for number, m in enumerate({id(m): m for m in (outcome.base, outcome.best, *others)}.values()):
        if number >= 2 and time.monotonic() > search.deadline:
            return
        search.progress(f"memory of {m.label}", search.done, search.planned)
        try:
            m.peak_bytes = search.bench.peak(m.recipe)
        except RuntimeError as error:  # a second process may be more than the memory holds
            logger.warning("The peak memory of %s could not be measured: %s.", m.label, error)


def compare(bench: Bench, recipes: Sequence[Recipe], progress: Progress) -> Outcome:
    """Measure `recipes` and the untouched model fully, interleaved."""
    search = _Search(bench, float("inf"), float("inf"), progress)
    search.run([bench.base, *recipes], drop=False)
    return search.outcome(float("inf"), "balanced", Profile.this())
