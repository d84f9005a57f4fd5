"""The main job: measure the untouched model, then candidate recipes, drop the dominated early, keep the front.

The search is a ladder. First the runtime (dtype, threads), then every method's candidates on the fastest runtime that
keeps the quality, then the front once more with the other dtype. Each rung measures a little of every candidate (one
document, one timed run), drops what another beats in everything, and measures the rest on the survivors.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import torch

from lissom.devices.meters import interleaved
from lissom.devices.profiles import Profile
from lissom.errors import UserError
from lissom.evolve.measure import Bench, Measured
from lissom.models.method import SearchContext
from lissom.recipes import Dtype, Recipe, method_class, method_names

logger = logging.getLogger(__name__)

Prefer = Literal["balanced", "speed", "memory"]
Progress = Callable[[str, int, int], None]

# Two timings this near to each other are called equal when one candidate is to be dropped for another.
_SAME_TIME = 1.05
ANSWER_TOKENS = 64  # an answer's length in the time that recipes are ranked by


@dataclass
class Outcome:
    """What `optimize` found.

    Attributes:
        base: the untouched model.
        measured: everything that was measured, `base` first.
        front: what nothing else beats in loss, time to the first token, time per token and cache bytes together.
        best: the preferred recipe within the quality floor; `base` where none is.
        max_loss: the quality floor, as a share.
        failed: why a recipe could not be measured, by label.
        untried: labels of recipes that the search did not come to.
        finished: false where the time or a key press ended the search early.
        interrupted: true where it was a key press.
        profile: the device for which it is.
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

    def __post_init__(self) -> None:
        self.front = [m for m in self.measured if not any(dominates(other, m) for other in self.measured)]

    @property
    def best(self) -> Measured:
        within = [m for m in self.front if m.loss.estimate <= self.max_loss]
        if self.prefer == "balanced":  # a smaller cache is no gain where the whole answer takes longer for it
            limit = answer_seconds(self.base, self.profile)
            within = [m for m in within if answer_seconds(m, self.profile) <= limit]
        return max([self.base, *within], key=lambda m: gain(m, self.base, self.prefer, self.profile))


def costs(measured: Measured) -> tuple[float, float, float, float]:
    """What is to be small: quality loss, bytes of the cache, seconds to the first token, seconds per token."""
    return measured.loss.estimate, measured.cache_bytes, measured.first_token, measured.decode


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
    """What a recipe wins: the speed-up of a whole answer, the factor on the cache, or the geometric mean of the two."""
    speed = answer_seconds(base, profile) / answer_seconds(measured, profile)
    memory = base.cache_bytes / measured.cache_bytes
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

    def run(self, recipes: Sequence[Recipe], drop: bool = True) -> None:
        """One rung for these recipes: a little of each, then the rest of those that are worth it."""
        workload = self.bench.workload
        new = {recipe.identity: recipe for recipe in recipes if recipe.identity not in self.measured}
        whole = workload.documents + workload.rounds
        self.planned += len(new) * whole
        self.wanted |= {identity: recipe.label for identity, recipe in new.items()}
        begun = []
        for recipe in sorted(new.values(), key=lambda r: r.dtype):  # models are exchanged as seldom as possible
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
        workload, base = self.bench.workload, next(iter(self.measured.values()))
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
        base = next(iter(self.measured.values()))
        for m in self.measured.values():
            m.loss = self.bench.loss(m.quality, base.quality)

    def _hopeless(self, candidate: Measured) -> bool:
        if candidate is next(iter(self.measured.values())):
            return False
        return any(dominates(m, candidate, _SAME_TIME) for m in self.measured.values())


def other_dtype(bench: Bench) -> Dtype:
    """bfloat16, or float32 where the checkpoint's own is bfloat16."""
    return "float32" if bench.own_dtype == torch.bfloat16 else "bfloat16"


def runtimes(model: str, other: Dtype) -> list[Recipe]:
    """The untouched model first, then other numbers of threads and the other dtype."""
    cores = os.cpu_count() or 1
    counts = sorted({1, max(1, cores // 2)} - {cores, torch.get_num_threads()})
    recipes = [Recipe(model=model), *(Recipe(model=model, threads=count) for count in counts)]
    return [*recipes, Recipe(model=model, dtype=other)]


def optimize(
    bench: Bench,
    max_loss: float,
    minutes: float,
    *,
    prefer: Prefer = "balanced",
    quick: bool = False,
    profile: Profile | None = None,
    progress: Progress = lambda label, done, planned: None,
) -> Outcome:
    """Search recipes for the bench's model. Whatever ends it early, what was measured is returned.

    Args:
        max_loss: quality loss that is accepted, as a share (see `Measured.loss`).
        minutes: after which nothing new is begun.
        quick: fewer candidates.
        progress: called with (label, measurements done, planned).
    """
    profile = profile or Profile.this()
    search = _Search(bench, max_loss, time.monotonic() + 60 * minutes, progress)
    model = bench.base.model
    finished, interrupted = True, False
    try:
        search.run(runtimes(model, other_dtype(bench)))
        base = next(iter(search.measured.values()))
        good = [m for m in search.measured.values() if m.loss.estimate <= max_loss]
        fastest = min(good, key=lambda m: answer_seconds(m, profile))
        context = SearchContext(bench.tokens, int(fastest.cache_bytes), quick)
        runtime = {"model": model, "dtype": fastest.recipe.dtype, "threads": fastest.recipe.threads}
        # In turns, so that a search that ends early has seen something of every method.
        groups = [method_class(key).candidates(context) for key in method_names()]
        candidates = [c for turn in zip_longest(*groups) for c in turn if c is not None]
        search.run([Recipe.of(candidate, **runtime) for candidate in candidates])
        outcome = search.outcome(max_loss, prefer, profile)
        ranked = sorted(outcome.front, key=lambda m: gain(m, base, prefer, profile), reverse=True)
        promising = [m.recipe for m in ranked if m.recipe.methods and m.loss.estimate <= 2 * max_loss][
            : 1 if quick else 3
        ]
        other = "auto" if fastest.recipe.dtype != "auto" else other_dtype(bench)
        search.run([recipe.model_copy(update={"dtype": other}) for recipe in promising])
    except _OutOfTime:
        finished = False
    except KeyboardInterrupt:
        finished, interrupted = False, True
    if not search.measured:
        raise KeyboardInterrupt
    outcome = search.outcome(max_loss, prefer, profile, finished, interrupted)
    if not interrupted:
        try:
            outcome = search.confirm(outcome)
            _measure_memory(search, outcome, everything=finished and not quick)
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
