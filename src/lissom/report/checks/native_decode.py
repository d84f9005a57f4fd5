"""The check of native decode: measured, as rows and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from lissom.devices.machine import describe
from lissom.evals.checks import native_decode as study
from lissom.evals.checks.native_decode import BF16, COMPACTED, GENERATE, INT8, LLAMA_CPP, Measured, Part
from lissom.evals.peers import OURS, Value, summarise
from lissom.evals.stats import median_interval
from lissom.report import peers
from lissom.report.checks import Outcome, Progress, SizeName
from lissom.report.rows import Claim, Result, Row

# What the parts are to show: lissom's arm, whose figure it is compared with, and by which factor it should be better.
_TARGETS = {
    ("decode", 512): ((OURS, LLAMA_CPP, 2.5), (GENERATE, LLAMA_CPP, 2.0)),
    ("decode", 8192): ((OURS, LLAMA_CPP, 5.0), (COMPACTED, LLAMA_CPP, 10.0)),
    ("billion", 512): ((OURS, LLAMA_CPP, 1.1),),
}
_FIRST = ((OURS, BF16, 1.0), (INT8, BF16, 1.0))
_BANDWIDTH = 0.7  # share of the measured read bandwidth that a model of a billion parameters should reach


def result(run: Sequence[Measured]) -> Result:
    """Every figure, lissom's ratio to each other runtime, and the verdicts."""
    rows, claims = list[Row](), list[Claim]()
    facts: dict = {"runtimes": {}, "settings": {}, "failed": {}, "notes": []}
    for measured in run:
        part, values = measured.part, summarise(measured.comparison)
        shares = list(_shares(measured, values))
        rows += peers.rows(measured.comparison, f"{part.name}/") + shares
        claims += [*_claims(part, values), *_bandwidth_claims(part, shares)]
        told = peers.facts(measured.comparison)
        facts["runtimes"] |= told["runtimes"]
        facts["settings"] |= {f"{part.name}/{name}": arm for name, arm in told["settings"].items()}
        facts["failed"] |= {f"{_label(part)}: {name}": why for name, why in told["failed"].items()}
        facts["notes"] += [note for note in told["notes"] if note not in facts["notes"]]
    return Result("native-decode", rows, claims, describe() | facts)


def _label(part: Part) -> str:
    return f"{part.name}, context {part.context}, {part.threads} thread{'s' * (part.threads > 1)}"


def _shares(measured: Measured, values: Sequence[Value]) -> Iterator[Row]:
    """The read bandwidth, and the share of it that lissom's steps reach with the weights that each of them reads."""
    part, speeds = measured.part, measured.bandwidth
    if not speeds:
        return
    top, where = max(speeds), f"{part.name}/threads {part.threads}/context {part.context}"
    yield Row(f"{where}/read bandwidth", top, "bytes/s", low=min(speeds), high=top, n=len(speeds))
    weights = {f.arm: f.facts["weight bytes"] for f in measured.comparison.figures if "weight bytes" in f.facts}
    for value in values:
        if value.metric.name == "decode" and value.arm in weights:
            own = median_interval([rate * weights[value.arm] / top for rate in value.rounds])
            name = f"{where}/{value.label}/share of the bandwidth"
            yield Row(name, own.estimate, "share", None, None, own.low, own.high, len(value.rounds))


def _claims(part: Part, values: Sequence[Value]) -> Iterator[Claim]:
    """`holds`: by the factor that is wanted and with the whole interval; `weaker`: better than the other all the
    same, or by that factor in the estimate only."""
    metric = "first token" if part.name == "first token" else "decode"
    known = {value.label: value for value in values if value.metric.name == metric}
    wanted = _FIRST if metric == "first token" else _TARGETS.get((part.name, part.context), ())
    for ours, theirs, factor in wanted:
        if ours in known and theirs in known:
            ratio = known[ours].against(known[theirs])
            reaches = ratio.low > 1 or ratio.estimate >= factor
            verdict = "holds" if ratio.low >= factor else "weaker" if reaches else "does not hold"
            reached = f"{ratio.estimate:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
            words = f"{_label(part)}: {ours} is {factor}x as fast as {theirs} or faster: {reached}"
            yield Claim(words, "lissom", verdict)


def _bandwidth_claims(part: Part, shares: Sequence[Row]) -> Iterator[Claim]:
    for row in shares:
        if row.unit == "share" and f"/{OURS}/" in row.name:
            verdict = "holds" if row.value >= _BANDWIDTH else "does not hold"
            words = (
                f"{_label(part)}: lissom reads weights at {_BANDWIDTH:.0%} of the bandwidth or more: {row.value:.0%}"
            )
            yield Claim(words, "lissom", verdict)


def tables(run: Sequence[Measured]) -> list[Table]:
    """One for each part."""
    return [table for measured in run for table in peers.tables(measured.comparison)]


class NativeDecodeCheck:
    """See `lissom.report.checks.Check`."""

    stages = study.STAGES

    def __call__(self, size: SizeName, model: str, journal: Path, progress: Progress) -> Outcome:
        """See `lissom.report.checks.Check`; the size of the paper is the default, since there is no paper."""
        return self.measure("default" if size == "paper" else size, (), model, journal, progress)

    def measure(self, size: str, counts: Sequence[int], model: str, journal: Path, progress: Progress) -> Outcome:
        """The same at any size of the study and with other numbers of threads."""
        run = study.run(model, size, journal, progress, counts)
        found = result(run)
        return Outcome(found, tables(run), [f"{what}: {why}" for what, why in found.facts["failed"].items()])


CHECK = NativeDecodeCheck()
