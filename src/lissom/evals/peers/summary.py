"""What a comparison says: each figure with its interval, and one runtime's against another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lissom.evals.peers.compare import Comparison, Figure
from lissom.evals.stats import Interval, median_interval, ratio_interval


@dataclass(frozen=True)
class Metric:
    """A kind of figure: its unit, whether more of it is better, and how it is read from what was measured."""

    name: str
    unit: str
    more_is_better: bool
    values: Callable[[Figure], list[float]]


DECODE = Metric("decode", "tokens/s", True, lambda figure: [1 / seconds for seconds in figure.steps])
FIRST = Metric("first token", "s", False, lambda figure: figure.first)
PEAK = Metric("peak memory", "bytes", False, lambda figure: [float(figure.peak)])
METRICS = (DECODE, FIRST, PEAK)


@dataclass(frozen=True)
class Value:
    """One runtime's figure: the median over rounds. Of several settings of a runtime it is the best one's (`arm`)."""

    label: str
    arm: str
    threads: int
    context: int
    metric: Metric
    rounds: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        return median_interval(self.rounds)

    def against(self, other: Value) -> Interval:
        """How much better than `other`: above 1 is better."""
        ours, theirs = self.rounds, other.rounds
        return ratio_interval(ours, theirs) if self.metric.more_is_better else ratio_interval(theirs, ours)


def summarise(comparison: Comparison, metrics: Sequence[Metric] = METRICS) -> list[Value]:
    """A value for each number of threads, context, runtime and metric that was measured."""
    found: dict[tuple[int, int, str, str], Value] = {}
    for figure in comparison.figures:
        for metric in metrics:
            rounds = tuple(metric.values(figure))
            if not rounds:
                continue
            value = Value(figure.label, figure.arm, figure.threads, figure.context, metric, rounds)
            key = (value.threads, value.context, value.label, metric.name)
            if key not in found or value.against(found[key]).estimate > 1:
                found[key] = value
    return list(found.values())
