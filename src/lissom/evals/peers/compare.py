"""Runtimes side by side: every one in its process, asked in turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lissom.devices.meters import interleaved
from lissom.errors import UserError
from lissom.evals.peers.arms import Arm, Material, choose, scratch
from lissom.evals.peers.process import Failed, OutOfTime, Worker

Progress = Callable[[str, int, int], None]
_WARM_PROMPT, _WARM_STEPS = 64, 4
# However late it is, an arm that is loaded has so many seconds to warm up: its loading would be wasted otherwise.
_GRACE = 10.0
_SETTLE = 0.02  # seconds between two arms: the threads of the one before may still be waiting for more, busily


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        reads: how often a prompt is read from an empty state.
        long_reads: the same for contexts above 4096 tokens, whose reading takes a minute.
        rounds: how often further tokens are generated behind it; 0 measures reading alone.
        tokens: in each round.
    """

    reads: int = 3
    long_reads: int = 1
    rounds: int = 5
    tokens: int = 32

    def reads_of(self, context: int) -> int:
        return self.reads if context <= 4096 else self.long_reads

    @property
    def least(self) -> Size:
        """Just enough to see whether an arm can do all of it."""
        return Size(reads=1, long_reads=1, rounds=min(1, self.rounds), tokens=1)

    @property
    def new(self) -> int:
        """Tokens that come behind a prompt."""
        return 1 + max(_WARM_STEPS, self.rounds * (self.tokens + 1))


@dataclass
class Figure:
    """What was measured of one arm at one context.

    Attributes:
        arm: its name; `label` is what it is called in the results.
        context: tokens of the prompt (see `compare`); the first step comes behind them.
        first: seconds to the first token, one per read.
        steps: seconds of a further token, the mean of each round.
        tokens: that came, so that runtimes of the same weights can be seen to compute the same.
        peak: peak resident bytes of the process so far, loading included.
        facts: what the runtime says about itself.
    """

    arm: str
    label: str
    threads: int
    context: int
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Comparison:
    """Figures of all arms, and why some have none (name to reason).

    Attributes:
        hurried: the time was too short for an arm or a round.
    """

    model: str
    figures: list[Figure]
    failed: dict[str, str]
    notes: list[str]
    hurried: bool = False

    def fail(self, arm: Arm, error: Exception) -> None:
        """Note why an arm has no figures."""
        self.failed[arm.name] = str(error)
        self.hurried |= isinstance(error, OutOfTime)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a journal."""
        return asdict(self)

    @classmethod
    def of_dict(cls, facts: dict[str, Any]) -> Comparison:
        """The inverse of `to_dict`."""
        figures = [Figure(**figure) for figure in facts["figures"]]
        return cls(facts["model"], figures, facts["failed"], facts["notes"], facts["hurried"])


def compare(
    model: str = "smollm2-135m",
    contexts: Sequence[int] = (512,),
    threads: Sequence[int] = (),
    arms: Sequence[Arm] = (),
    size: Size = Size(),
    progress: Progress = lambda what, done, total: None,
    deadline: float = float("inf"),
) -> Comparison:
    """Measure arms on one model, interleaved.

    At each context a prompt is read, then tokens are generated behind it in rounds. The prompt has `context` tokens,
    or fewer where the model's limit leaves no room for the tokens to come. They are drawn at random: no runtime's
    speed depends on which they are. All arms are in memory at once.

    Args:
        model: as for `lissom.load`.
        threads: one comparison for each count; default: as many as PyTorch uses.
        arms: see `choose`; default: all.
        progress: told what is being done, and how much is done of how much.
        deadline: time of `time.monotonic` after which no further arm is loaded and no further round begun. An arm that
            is loaded by then is measured once at least.

    Raises:
        UserError: the model is unknown, or reads fewer tokens.
    """
    arms, threads = arms or choose(), threads or (torch.get_num_threads(),)
    contexts = sorted(contexts)
    with scratch() as folder:
        material = Material(model, Path(folder))
        _check(material, contexts, threads, size)
        found = Comparison(model, [], {}, material.notes)
        total = len(threads) * len(arms) * (1 + sum(1 + size.reads_of(c) + size.rounds for c in contexts))
        counter = _Counter(progress, total)
        for count in threads:
            with ExitStack() as stack:
                workers = _open(arms, material, count, stack, found, counter, deadline)
                for context in contexts:
                    _measure(workers, material, count, context, size, found, counter, deadline)
    return found


def _check(material: Material, contexts: Sequence[int], threads: Sequence[int], size: Size) -> None:
    limit = getattr(material.config, "max_position_embeddings", None) or max(contexts) + size.new
    for context in contexts:
        if context < 1:
            raise UserError(f"A context of {context} tokens: expected at least 1.")
        if context > limit or limit <= size.new:
            raise UserError(f"{material.model} reads at most {limit} tokens: no context of {context} can be measured.")
    for count in threads:
        if count < 1:
            raise UserError(f"{count} threads: expected at least 1.")


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def say(self, what: str) -> None:
        self._progress(what, self._done, self._total)

    def add(self, what: str, count: int = 1) -> None:
        self._done += count
        self._progress(what, self._done, self._total)


def _open(
    arms: Sequence[Arm],
    material: Material,
    threads: int,
    stack: ExitStack,
    found: Comparison,
    counter: _Counter,
    deadline: float,
) -> dict[Arm, Worker]:
    workers = {}
    for arm in arms:
        counter.say(f"loading {arm.name}")
        try:
            if time.monotonic() > deadline:
                raise OutOfTime("there was no time for it")
            settings = material.settings(arm, threads, deadline)
            worker = stack.enter_context(Worker(arm.runtime, threads, deadline))
            worker.open(settings)
            workers[arm] = worker
        except (Failed, UserError) as error:
            found.fail(arm, error)
        counter.add(f"loaded {arm.name}")
    return workers


def _measure(
    workers: dict[Arm, Worker],
    material: Material,
    threads: int,
    context: int,
    size: Size,
    found: Comparison,
    counter: _Counter,
    deadline: float,
) -> None:
    """One context, of every arm that has not failed yet."""
    limit = getattr(material.config, "max_position_embeddings", None) or context + size.new
    tokens = min(context, limit - size.new)
    ids = random.Random(context).choices(range(material.config.vocab_size), k=tokens)
    capacity = tokens + size.new
    figures = {
        arm: Figure(arm.name, arm.label, threads, context, facts=worker.facts) for arm, worker in workers.items()
    }

    def attempt(arm: Arm, what: str, work: Callable[[Worker], None]) -> None:
        if arm.name in found.failed:
            return
        counter.say(f"{arm.name}: {what}")
        try:
            time.sleep(_SETTLE)
            work(workers[arm])
        except Failed as error:
            found.fail(arm, error)
        counter.add(f"{arm.name}: {what}")

    def warm(worker: Worker) -> None:
        # As the first calls compile and allocate. The capacity is what is compiled for.
        worker.deadline = max(deadline, time.monotonic() + _GRACE)
        worker.ask("read", ids=ids[:_WARM_PROMPT], capacity=capacity)
        worker.ask("step", count=_WARM_STEPS)
        worker.deadline = float("inf")

    def read(arm: Arm, worker: Worker) -> None:
        answer = worker.ask("read", ids=ids, capacity=capacity)
        figures[arm].first.append(answer["seconds"][0])
        figures[arm].tokens, figures[arm].peak = answer["tokens"], answer["peak"]

    def step(arm: Arm, worker: Worker) -> None:
        answer = worker.ask("step", count=size.tokens + 1)
        # Not the first one: it pays for the pause before it.
        figures[arm].steps.append(sum(answer["seconds"][1:]) / size.tokens)
        figures[arm].tokens += answer["tokens"]
        figures[arm].peak = answer["peak"]

    where = f"{threads} thread{'s' * (threads > 1)}, context {context}"
    for arm in workers:
        attempt(arm, f"{where}, warming up", warm)
    for work, repeats, doing in ((read, size.reads_of(context), "reading"), (step, size.rounds, "decoding")):
        turns = {arm.name: partial(attempt, arm, f"{where}, {doing}", partial(work, arm)) for arm in workers}
        for number, _ in enumerate(interleaved(turns, repeats)):
            if (number + 1) % len(turns) == 0 and number + 1 < repeats * len(turns) and time.monotonic() > deadline:
                found.hurried = True
                break
    found.figures += [figure for arm, figure in figures.items() if arm.name not in found.failed]
