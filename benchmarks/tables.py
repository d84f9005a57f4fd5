"""The tables of the docs, made from the committed results. With --check nothing is written: exit code 1 where a page
is not what the results say."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.S)
Rows = dict[str, dict[str, Any]]


def load(name: str) -> tuple[dict[str, Any], Rows]:
    """A result, and its rows by name."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        sys.exit(f"{file.relative_to(ROOT)} is missing: run the benchmark of that name with --json.")
    facts = json.loads(file.read_text())
    return facts, {row["name"]: row for row in facts["rows"]}


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with its first column to the left and all others to the right."""
    rule = "|---|" + "---:|" * (len(headings) - 1)
    return "\n".join(["| " + " | ".join(headings) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def stamp(facts: dict[str, Any]) -> str:
    """Where, with what and when it was measured."""
    machine, versions = facts["machine"], facts["versions"]
    if "gpu" in machine:
        return f"{machine['gpu']}, torch {versions['torch']}, {facts['date'][:10]}."
    return (
        f"{machine['cpu']}, {counted(machine['threads'])}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {facts['date'][:10]}."
    )


def number(row: dict[str, Any], digits: int = 3) -> str:
    return f"{row['value']:.{digits}f}"


def spread(row: dict[str, Any] | None, form: str = ".2f", key: str = "value") -> str:
    """A figure and its interval; nothing where there is none."""
    return "" if row is None else f"{row[key]:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def interval(row: dict[str, Any], form: str = "+.3f") -> str:
    """A difference and its interval; nothing where it is with itself."""
    return "" if row["low"] == row["high"] == 0 else spread(row, form)


def verdicts(facts: dict[str, Any], part: str = "") -> str:
    """A line for each claim, or for those about one part."""
    claims = [claim for claim in facts["claims"] if claim["claim"].startswith(part)]
    return "\n".join(f"- **{claim['verdict']}**: {claim['claim']}" for claim in claims)


def arms_of(rows: Rows, ratio: str) -> list[str]:
    return list(dict.fromkeys(name.split("/")[1] for name in rows if name.startswith(f"{ratio}/")))


BASELINES = (
    "random", "streaming-llm", "h2o", "snapkv", "tova", "kvzip", "kvzip global", "expected-attention",
)  # fmt: skip


METRICS = ("output_error", "mass_error", "nll", "kl", "top1", "recalled", "bytes", "off-context NLL")


def attention_matching() -> str:
    """Ours and every baseline at each ratio."""
    facts, rows = load("attention-matching")
    ratios = [ratio for ratio in ("0.2", "0.1", "0.05", "0.02") if f"{ratio}/attention matching/nll" in rows]
    parts = []
    for ratio in ratios:
        lines = []
        for arm in ("attention matching", *BASELINES):
            row = {metric: rows[f"{ratio}/{arm}/{metric}"] for metric in METRICS}
            gap = rows.get(f"{ratio}/{arm}/nll above ours")
            off = row["off-context NLL"]
            lines.append(
                [
                    f"**{arm}**" if arm == "attention matching" else arm,
                    number(row["output_error"]),
                    number(row["mass_error"]),
                    number(row["nll"]),
                    spread(gap, "+.2f"),
                    number(row["kl"]),
                    f"{row['top1']['value']:.1%}",
                    f"{row['recalled']['value']:.0%}",
                    f"{off['value'] - off['baseline']:+.2f}",
                    f"{row['bytes']['value'] / row['bytes']['baseline']:.1%}",
                ]
            )
        headings = ["method", "output error", "abs. Δ log Z", "NLL", "NLL above ours [95 %]", "KL", "top-1", "recall",
                    "off-context", "bytes"]  # fmt: skip
        parts.append(f"**{float(ratio):.0%} of the entries**\n\n{markdown(headings, lines)}")
    return "\n\n".join([verdicts(facts), *parts, stamp(facts)])


def attention_matching_ablations() -> str:
    """What changes where one thing is done otherwise."""
    facts, rows = load("attention-matching")
    ratios = [ratio for ratio in ("0.1", "0.05") if f"{ratio}/no bias/nll" in rows]
    names = [arm for arm in arms_of(rows, ratios[0]) if arm not in (*BASELINES, "attention matching")]
    lines = []
    for arm in ("attention matching", *names):
        line = [f"**{arm}**" if arm == "attention matching" else arm]
        for ratio in ratios:
            gap = rows.get(f"{ratio}/{arm}/nll above ours")
            line += [
                number(rows[f"{ratio}/{arm}/output_error"]),
                number(rows[f"{ratio}/{arm}/nll"]),
                spread(gap, "+.2f"),
                f"{rows[f'{ratio}/{arm}/recalled']['value']:.0%}",
            ]
        lines.append(line)
    headings = ["", *(f"{float(ratio):.0%}: {what}" for ratio in ratios
                      for what in ("output error", "NLL", "above ours [95 %]", "recall"))]  # fmt: skip
    return markdown(headings, lines) + "\n\n" + stamp(facts)


def attention_matching_needles() -> str:
    """Share of needles found."""
    _, rows = load("attention-matching")
    found = {name.split("/")[2]: row for name, row in rows.items() if name.startswith("needles/")}
    lines = [[name, f"{row['value']:.0%} of {row['n']}"] for name, row in found.items()]
    return markdown(["method, 10 % of the entries", "needles found"], lines)


def attention_matching_times() -> str:
    """Seconds of each stage beside the prefill."""
    facts, rows = load("attention-matching")
    lines = []
    for name in [name.removeprefix("time/float32/") for name in rows if name.startswith("time/float32/")]:
        line = [name]
        for dtype in ("float32", "bfloat16"):
            row = rows[f"time/{dtype}/{name}"]
            line += [f"{row['value']:.2f} s", f"{row['value'] / row['baseline']:.2f}"]
        lines.append(line)
    headings = ["stage", "float32", "of the prefill's", "bfloat16", "of the prefill's"]
    return markdown(headings, lines) + "\n\n" + stamp(facts)


def attention_matching_options() -> str:
    """What the defaults were chosen from."""
    facts, rows = load("attention-matching-options")
    ratios = list(dict.fromkeys(name.split("/")[0] for name in rows))
    lines = []
    for arm in arms_of(rows, ratios[0]):
        line = ["**the default**" if arm == "attention matching" else arm]
        for ratio in ratios:
            row = rows[f"{ratio}/{arm}/NLL"]
            gap = f"{row['value'] - row['baseline']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            line += [number(row), "" if arm == "published fit" else gap]
        lines.append(line)
    headings = ["", *(f"{float(ratio):.0%}: {what}" for ratio in ratios for what in ("NLL", "to the published [95 %]"))]
    return markdown(headings, lines) + "\n\n" + stamp(facts)


def kv_budget() -> str:
    """Attention matching and eviction within a number of bytes."""
    facts, rows = load("kv-budget")
    lines = []
    for share in dict.fromkeys(name.split("/")[0] for name in rows if not name.startswith("full/")):
        for method in arms_of(rows, share):
            row = {name.removeprefix(f"{share}/{method}/"): row for name, row in rows.items()}
            gap = row["answers NLL above ours"]
            above = spread(gap, "+.2f")
            ours = method == "attention-matching"  # what the others are compared with
            lines.append(
                [
                    f"{float(share):.0%}, {f'**{method}**' if method == 'h2o' else method}",
                    f"{row['text NLL above full']['value']:+.3f}",
                    number(row["answers NLL"]),
                    "" if ours else above,
                    number(row["KL"]),
                    f"{row['bytes']['value']:.1%}",
                ]
            )
    headings = ["budget, method", "text: ΔNLL", "answers: NLL", "above attention matching [95 %]", "KL",
                "bytes at the end"]  # fmt: skip
    whole = f"The full cache's own answers have an NLL of {number(rows['full/answers NLL'])}."
    return f"{markdown(headings, lines)}\n\n{whole} {stamp(facts)}"


def _places(rows: Rows, part: str) -> dict[int, list[int]]:
    """Contexts that were measured in a part, each with its numbers of threads."""
    found: dict[int, list[int]] = {}
    for name in rows:
        first, threads, context, *_ = name.split("/")
        if first == part:
            counts = found.setdefault(int(context.split()[1]), [])
            counts += [count for count in [int(threads.split()[1])] if count not in counts]
    return found


def _runtimes(rows: Rows, part: str, context: int, metric: str) -> list[str]:
    names = [name.split("/") for name in rows if name.startswith(f"{part}/") and name.endswith(f"/{metric}")]
    labels = dict.fromkeys(label for _, _, where, label, _ in names if where == f"context {context}")
    return [label for label in labels if " against " not in label]


def _times(rows: Rows, where: str, label: str, metric: str) -> str:
    """lissom's factor over another runtime, with its interval."""
    row = rows.get(f"{where}/lissom against {label}/{metric}")
    return spread(row, key="ratio")


def _named(label: str) -> str:
    return f"**{label}**" if label == "lissom" else label


def _decode(part: str) -> list[str]:
    """Tokens per second of every runtime, a table for each context."""
    _, rows = load("native-decode")
    parts = []
    for context, counts in _places(rows, part).items():
        lines = []
        for label in _runtimes(rows, part, context, "decode"):
            line = [_named(label)]
            for count in counts:
                where = f"{part}/threads {count}/context {context}"
                row = rows.get(f"{where}/{label}/decode")
                own = spread(row, ".1f")
                line += [own, _times(rows, where, label, "decode")]
            peak = rows[f"{part}/threads {counts[-1]}/context {context}/{label}/peak memory"]
            lines.append([*line, f"{peak['value'] / 1e6:.0f} MB"])
        threads = [counted(count) for count in counts]
        headings = ["tokens/s [95 %]", *(h for t in threads for h in (t, "lissom is x times as fast")), "peak memory"]
        parts.append(f"**Behind {context} tokens**\n\n{markdown(headings, lines)}")
    return parts


def native_decode() -> str:
    """Decode speed beside every other runtime."""
    facts, _ = load("native-decode")
    return "\n\n".join([verdicts(facts, "decode"), *_decode("decode"), stamp(facts)])


def native_decode_first() -> str:
    """Seconds to the first token."""
    facts, rows = load("native-decode")
    places = _places(rows, "first token")
    labels = dict.fromkeys(l for c in places for l in _runtimes(rows, "first token", c, "first token"))  # noqa: E741
    lines = []
    for label in labels:
        line = [_named(label)]
        for context, counts in places.items():
            where = f"first token/threads {counts[-1]}/context {context}"
            row = rows.get(f"{where}/{label}/first token")
            factor = rows.get(f"{where}/lissom against {label}/first token")
            line.append(
                "" if row is None else f"{row['value']:.3f}" + ("" if factor is None else f" ({factor['ratio']:.2f}x)")
            )
        lines.append(line)
    headings = ["seconds (lissom is x times as fast)", *(f"{context} tokens" for context in places)]
    return "\n\n".join([verdicts(facts, "first token"), markdown(headings, lines), stamp(facts)])


def native_decode_billion() -> str:
    """A model of a billion parameters beside the memory's bandwidth."""
    facts, rows = load("native-decode")
    speeds = [
        f"{name.split('/')[1]}: {row['value'] / 1e9:.1f} GB/s"
        for name, row in rows.items()
        if name.endswith("read bandwidth")
    ]
    words = f"Read bandwidth: {', '.join(speeds)}."
    return "\n\n".join([verdicts(facts, "billion"), *_decode("billion"), words, stamp(facts)])


def quantize() -> str:
    """Every method on both kinds of weights, and the verdicts."""
    facts, rows = load("quantize")
    lines = []
    for arm in arms_of(rows, "permuted"):
        if " against " in arm:
            continue
        line = [arm, number(rows[f"permuted/{arm}/bits per weight"], 2)]
        for kind in ("permuted", "rotated"):
            line += [number(rows[f"{kind}/{arm}/perplexity"], 2), interval(rows[f"{kind}/{arm}/NLL above fp32"])]
        lines.append(line)
    headings = ["method", "bits", *(f"{kind}: {what}" for kind in ("permuted", "rotated")
                                    for what in ("perplexity", "ΔNLL [95 %]"))]  # fmt: skip
    return "\n\n".join([verdicts(facts), markdown(headings, lines), _against(rows), stamp(facts)])


def _against(rows: Rows) -> str:
    pairs = [name.split("/", 1)[1] for name in rows if name.startswith("permuted/") and " against " in name]
    lines = [
        [*pair.removesuffix("/NLL").split(" against "), *(interval(rows[f"{kind}/{pair}"])
                                                          for kind in ("permuted", "rotated"))]
        for pair in pairs
    ]  # fmt: skip
    return markdown(["ours", "against", "permuted: NLL above [95 %]", "rotated: NLL above [95 %]"], lines)


def quantize_load() -> str:
    """Seconds of loading."""
    facts, rows = load("quantize")
    lines = []
    for what, words in (("load", "`from_pretrained`"), ("use", "and the first pass, of one token")):
        names = ("transformers fp32", "lissom 4-bit", "share")
        row = [rows[f"loading/{name}/{what}"] for name in names]
        lines.append([words, *map(spread, row)])
    headings = ["", "transformers, fp32: seconds [95 %]", "lissom, 4 bits: seconds [95 %]", "share [95 %]"]
    return f"{markdown(headings, lines)}\n\n{stamp(facts)}"


def _of(rows: Rows, part: str) -> list[list[str]]:
    """Names of the rows of a part, cut at their slashes."""
    return [name.split("/") for name in rows if name.startswith(f"{part}/")]


def flash_prefill_text() -> str:
    """NLL and density of every selection, a line each."""
    facts, rows = load("flash-prefill")
    names = _of(rows, "text")
    places = list(dict.fromkeys((source, length) for _, source, length, _, _ in names))
    lines = []
    for arm in dict.fromkeys(arm for _, _, _, arm, _ in names):
        line = [f"**{arm}**" if arm == "flashprefill" else arm]
        for source, length in places:
            where = f"text/{source}/{length}/{arm}"
            gap, density = rows[f"{where}/NLL above dense"], rows[f"{where}/density"]["value"]
            line.append(number(rows[f"{where}/NLL"]) if arm == "dense" else f"{interval(gap)} @ {density:.1%}")
        lines.append(line)
    headings = ["NLL above dense [95 %] @ density", *(f"{source}, {length}" for source, length in places)]
    return f"{markdown(headings, lines)}\n\n{stamp(facts)}"


def flash_prefill_tasks() -> str:
    """Right items, and NLL."""
    facts, rows = load("flash-prefill")
    names = _of(rows, "task")
    tasks = list(dict.fromkeys(task for _, task, _, _ in names))
    lines = []
    for arm in dict.fromkeys(arm for _, _, arm, _ in names):
        line = [arm]
        for task in tasks:
            right, nll = (rows[f"task/{task}/{arm}/{what}"] for what in ("right", "NLL"))
            line += [f"{round(right['value'] * right['n'])} of {right['n']}", number(nll, 2)]
        lines.append(line)
    headings = ["", *(f"{task}{what}" for task in tasks for what in ("", ": NLL"))]
    return f"{markdown(headings, lines)}\n\n{stamp(facts)}"


def flash_prefill_times() -> str:
    """Seconds of whole prompts and of their attention."""
    facts, rows = load("flash-prefill")
    names = _of(rows, "time")
    parts = []
    for dtype in dict.fromkeys(dtype for _, dtype, *_ in names):
        lengths = list(dict.fromkeys(length for _, kind, length, _, _ in names if kind == dtype))
        lines = []
        for arm in dict.fromkeys(arm for _, _, _, arm, _ in names):
            line = [f"**{arm}**" if arm == "flashprefill" else arm]
            for length in lengths:
                where = f"time/{dtype}/{length}/{arm}"
                for what in ("attention", "whole"):
                    row = rows[f"{where}/{what}"]
                    line.append(f"{row['value']:.2f}" + ("" if arm == "SDPA" else f" ({row['ratio']:.2f}x)"))
            lines.append(line)
        headings = [dtype, *(f"{length}: {what}" for length in lengths for what in ("attention", "all"))]
        parts.append(markdown(headings, lines))
    return "\n\n".join([verdicts(facts), *parts, stamp(facts)])


def flash_prefill_synthetic() -> str:
    """Attention of one layer with made-up queries and keys."""
    facts, rows = load("flash-prefill")
    names = _of(rows, "synthetic")
    lines = []
    for entries in dict.fromkeys(entries for _, entries, _, _ in names):
        line = [entries]
        for arm in dict.fromkeys(arm for _, _, arm, _ in names):
            row = rows[f"synthetic/{entries}/{arm}/attention of a layer"]
            density = rows[f"synthetic/{entries}/{arm}/density"]["value"]
            line.append(f"{row['value']:.3f}" + ("" if arm == "SDPA" else f" ({row['ratio']:.1f}x, {density:.0%})"))
        whole = _prompt(rows, int(entries))
        line += [f"{seconds:.0f}" for seconds in whole] + [f"{whole[0] / whole[-1]:.1f}x"]
        lines.append(line)
    arms = list(dict.fromkeys(arm for _, _, arm, _ in names))
    headings = ["entries", *arms, "prompt, SDPA", "prompt, flashprefill", ""]
    return f"{markdown(headings, lines)}\n\n{stamp(facts)}"


def flash_prefill_gpu() -> str:
    """Attention of one layer with made-up queries and keys, on a GPU."""
    facts, rows = load("flash-prefill-gpu")
    names = [name.split("/") for name in rows if name.endswith("/attention of a layer")]
    arms = list(dict.fromkeys(arm for _, arm, _ in names))
    lines = []
    for entries in dict.fromkeys(entries for entries, _, _ in names):
        line = [entries]
        for arm in arms:
            row = rows[f"{entries}/{arm}/attention of a layer"]
            cell = f"{row['value']:.3g}"
            if arm != "SDPA":
                cell += f" ({row['ratio']:.2f}x, {rows[f'{entries}/{arm}/density']['value']:.0%})"
            line.append(cell)
        lines.append([*line, f"{rows[f'{entries}/flashprefill/choosing']['value']:.2f}"])
    return f"{markdown(['entries', *arms, 'choosing'], lines)}\n\n{stamp(facts)}"


def _prompt(rows: Rows, entries: int) -> list[float]:
    """Seconds of a whole prompt of the fp32 model as they follow from its parts: what is not attention at the longest
    length that was timed, for as many tokens, and the attention of a layer for all layers."""
    timed = max(int(length) for _, _, length, *_ in _of(rows, "time"))
    base = f"time/float32/{timed}"
    rest = (rows[f"{base}/SDPA/whole"]["value"] - rows[f"{base}/SDPA/attention"]["value"]) / timed
    layers = rows["layers"]["value"]
    attention = [rows[f"synthetic/{entries}/{arm}/attention of a layer"]["value"] for arm in ("SDPA", "flashprefill")]
    return [rest * entries + layers * seconds for seconds in attention]


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _speed(rows: Rows, part: str) -> str:
    """Every arm, a line each, and a column for each place that it was measured in."""
    names = _of(rows, part)
    places = list(dict.fromkeys("/".join(name[:-1]) for name in names))
    lines = []
    for arm in dict.fromkeys(name[-1] for name in names):
        cells = [rows.get(f"{place}/{arm}") for place in places]
        values = ("" if row is None else f"{_short(row['value'])} ({row['ratio']:.2f}x)" for row in cells)
        lines.append([f"**{arm}**" if arm == "2:4" else arm, *values])
    shown = [f"{place.split('/')[1]}, {counted(int(place.split('/')[-1].split()[0]))}" for place in places]
    return markdown(["(x times as fast as dense ternary)", *shown], lines)


def sparse_bitnet_kernels() -> str:
    """Products of a vector, products of many, and decoding."""
    facts, rows = load("sparse-bitnet-kernels")
    parts = [verdicts(facts)]
    for vectors in ("1", "256"):
        kept = {name: row for name, row in rows.items() if name.split("/")[2] == vectors or name.startswith("decode")}
        parts += [f"**Products of {vectors} vector{'s' * (vectors != '1')}**", _speed(kept, "product")]
    return "\n\n".join([*parts, "**Decoding**", _speed(rows, "decode"), stamp(facts)])


def sparse_bitnet_training() -> str:
    """Every arm from scratch, and the verdicts."""
    facts, rows = load("sparse-bitnet")
    lines = []
    for arm in arms_of(rows, "training"):
        if f"training/{arm}/perplexity" not in rows:
            continue
        gaps = [rows.get(f"training/{arm}/NLL above {base}") for base in ("dense", "2:4")]
        lines.append(
            [
                arm,
                str(int(rows[f"training/{arm}/perplexity"]["n"])),
                number(rows[f"training/{arm}/perplexity"], 2),
                *("" if gap is None else interval(gap) for gap in gaps),
                number(rows[f"training/{arm}/perplexity of held-out text"], 2),
            ]
        )
    heads = [
        "arm",
        "seeds",
        "perplexity",
        "NLL above dense [95 %]",
        "NLL above ternary 2:4 [95 %]",
        "perplexity of held-out text",
    ]
    table = markdown(heads, lines)
    words = f"{facts['tokens'] / 1e6:.2f} million tokens in {facts['steps']} steps. {stamp(facts)}"
    return "\n\n".join([verdicts(facts), table, words])


def sparse_bitnet_over_time() -> str:
    """Zeros, and places of masks that changed since the step before."""
    _, rows = load("sparse-bitnet")
    names = _of(rows, "over time")
    parts = []
    for what, title in (("zeros", "Zeros"), ("mask_flips", "Mask places that changed since the last line")):
        steps = list(dict.fromkeys(int(name[3]) for name in names if name[2] == what))
        shown = steps[:: max(1, len(steps) // 5)]
        lines = []
        for arm in dict.fromkeys(name[1] for name in names if name[2] == what):
            cells = [rows.get(f"over time/{arm}/{what}/{step}") for step in shown]
            lines.append([arm, *("" if cell is None else f"{cell['value']:.1%}" for cell in cells)])
        parts.append(markdown([f"{title}, after steps", *map(str, shown)], lines))
    return "\n\n".join(parts)


def sparse_bitnet_conversion() -> str:
    """The embedded model before, with its weights rounded, and after training."""
    facts, rows = load("sparse-bitnet")
    lines = []
    for state in arms_of(rows, "conversion"):
        gap = rows.get(f"conversion/{state}/NLL above before")
        lines.append([state, number(rows[f"conversion/{state}/perplexity"], 1), "" if gap is None else interval(gap)])
    table = markdown(["", "perplexity", "NLL above before [95 %]"], lines)
    return f"{table}\n\n{facts['conversion tokens'] / 1e3:.0f} thousand tokens. {stamp(facts)}"


def noble() -> str:
    """Every arm from scratch, what its steps cost, and the learning rates that were tried."""
    facts, rows = load("noble")
    lines = []
    for arm in arms_of(rows, "training"):
        gap = rows.get(f"training/{arm}/NLL of CosNet above it")
        times = [rows.get(f"training/{arm}/{what} to the baseline's loss") for what in ("steps", "time")]
        costs = [rows[f"step/{arm}/{what}"] for what in ("parameters", "operations", "time")]
        lines.append(
            [
                arm,
                number(rows[f"training/{arm}/NLL"]),
                "" if gap is None else interval(gap),
                *("" if row is None else f"{row['ratio']:.2f}x [{row['low']:.2f}, {row['high']:.2f}]" for row in times),
                *(f"{row['value'] / row['baseline'] - 1:+.1%}" for row in costs),
            ]
        )
    heads = [
        "arm",
        "NLL at the end",
        "CosNet above it [95 %]",
        "fewer steps [95 %]",
        "less time [95 %]",
        "parameters",
        "operations",
        "time of a step",
    ]
    tried = _of(rows, "tuning")
    rates = list(dict.fromkeys(name[2] for name in tried))
    tuned = [
        [arm, *(number(rows[f"tuning/{arm}/{rate}"]) for rate in rates)] for arm in dict.fromkeys(n[1] for n in tried)
    ]
    words = (
        f"{int(rows['training/baseline/NLL']['n'])} seeds, rank {facts['rank']}, {facts['tokens'] / 1e6:.2f} million "
        f"tokens in {facts['steps']} steps. {stamp(facts)}"
    )
    rest = markdown(["NLL of short runs, learning rate", *rates], tuned)
    return "\n\n".join([verdicts(facts), markdown(heads, lines), words, rest])


def noble_cost(device: str) -> str:
    """Layers and a step, a line each: without branches, operation by operation and fused; and what they keep."""
    facts, rows = load(f"noble-cost-{device}")
    plain, eager, fused = "plain", "operation by operation", "fused"
    lines = []
    for place in dict.fromkeys("/".join(name[:2]) for name in (*_of(rows, "layer"), *_of(rows, "step"))):
        for end in ("", ", compiled"):
            found = [rows.get(f"{place}/{arm}{end}") for arm in (plain, eager, fused)]
            if found[0] is None:
                continue
            times = [row["value"] for row in found]
            against = rows.get(f"{place}/{fused}{end} against {eager}{end}")
            ratio = f"{times[1] / times[2]:.2f}x"
            if against is not None:
                ratio = f"{against['ratio']:.2f}x [{against['low']:.2f}, {against['high']:.2f}]"
            title = place.replace("layer/", "").replace("step/", "a step, ") + end
            shares = [f"{time:.3g} ({time / times[0] - 1:+.0%})" for time in times[1:]]
            lines.append([title, f"{times[0]:.3g}", *shares, ratio])
    table = markdown(["ms, forward and backward", "without branches", eager, fused, f"{fused} against that"], lines)
    step = next(name[1] for name in _of(rows, "step"))
    words = []
    for what, title in (("operations", "operations"), ("parameters", "parameters"), ("kept", "kept for the gradients")):
        shares = [rows[f"step/{step}/{what}/{arm}"] for arm in (eager, fused)]
        one, other = (row["value"] / row["baseline"] - 1 for row in shares)
        words.append(f"{title} {other:+.1%}" if one == other else f"{title} {one:+.1%} and, fused, {other:+.1%}")
    return f"{verdicts(facts)}\n\n{table}\n\nOf the step, against no branches: {'; '.join(words)}. {stamp(facts)}"


def bandpo() -> str:
    """The bandit, what policies came to, and which tokens were clipped."""
    facts, rows = load("bandpo")
    inner = max(int(name[1].split()[0]) for name in _of(rows, "bandit"))
    lines = []
    for arm in dict.fromkeys(name[2] for name in _of(rows, "bandit")):
        place = f"bandit/{inner} inner steps/{arm}"
        found = [rows[f"{place}/{what}"] for what in ("return", "P(best)", "entropy", "clipped")]
        once = rows[f"bandit/1 inner steps/{arm}/return"]
        lines.append([arm, spread(found[0], ".3f"), *(number(row) for row in (*found[1:], once))])
    heads = ["bandit", "return [95 %]", "P(best)", "entropy", "clipped", "return, one inner step"]
    parts = [markdown(heads, lines)]
    before = [number(rows[f"learning/before/{what}"]) for what in ("mean@K", "pass@K")]
    lines = [["before", *before, "", "", ""]]
    arms = [arm for arm in arms_of(rows, "learning") if arm != "before"]
    for arm in arms:
        found = [rows[f"learning/{arm}/{what}"] for what in ("mean@K", "pass@K", "late entropy", "rare clipped up")]
        gap = rows.get(f"learning/{arm}/mean@K above Clip-Higher")
        cells = [number(row) for row in found[:3]]
        lines.append([arm, *cells, f"{found[3]['value']:.1%}", "" if gap is None else interval(gap)])
    heads = ["Countdown", "mean@16", "pass@16", "late entropy", "rare clipped upwards", "above Clip-Higher [95 %]"]
    parts.append(markdown(heads, lines))
    for sign, words in (("up", "upwards"), ("down", "downwards")):
        buckets = {name[4] for name in _of(rows, "learning") if name[2:4] == ["clipped", sign]}
        buckets = sorted(buckets, key=lambda bucket: float(bucket.split("-")[0]))
        lines = []
        for arm in arms:
            shares = [rows.get(f"learning/{arm}/clipped/{sign}/{bucket}") for bucket in buckets]
            lines.append([arm, *("" if share is None else f"{share['value']:.1%}" for share in shares)])
        parts.append(markdown([f"clipped {words}, p of", *buckets], lines))
    rates = ", ".join(f"{arm} {rate:g}" for arm, rate in facts["rates"].items())
    seeds = rows[f"learning/{arms[0]}/mean@K"]["n"]
    words = (
        f"{seeds} seeds, {facts['tokens']:,} generated tokens each, rates {rates}, {facts['held out']} held out. "
        f"{stamp(facts)}"
    )
    return "\n\n".join([verdicts(facts), *parts, words])


def klein_kv() -> str:
    """Edits of concepts that the model has not seen, by every way to draw them."""
    facts, rows = load("klein-kv")
    metrics = ("psnr", "ssim", "distance", "recognised", "style")
    parts = []
    for kind in dict.fromkeys(name.split("/")[0] for name in rows if name.startswith("edit ")):
        lines = []
        for arm in dict.fromkeys(name.split("/")[1] for name in rows if name.startswith(f"{kind}/")):
            own = {metric: rows[f"{kind}/{arm}/{metric}"] for metric in metrics}
            gap = rows[f"{kind}/{arm}/psnr gained"]
            lines.append(
                [
                    arm,
                    number(own["psnr"], 2),
                    interval(gap, "+.2f"),
                    number(own["ssim"], 2),
                    number(own["distance"], 3),
                    f"{own['recognised']['value']:.0%}",
                    f"{own['style']['value']:.0%}",
                ]
            )
        headings = [kind, "PSNR", "gained [95 %]", "SSIM", "feature distance", "recognised", "of the style"]
        parts.append(markdown(headings, lines))
    words = f"{facts['concepts']} held-out concepts, {facts['sampler']} steps; {facts['steps']} steps of training, and "
    return "\n\n".join([verdicts(facts), *parts, f"{words}{facts['short']} with the mask. {stamp(facts)}"])


def klein_kv_speed() -> str:
    """Times faster than with references in every step, beside the bounds."""
    facts, rows = load("klein-kv")
    arms = ("in every step, masked", "diffusers", "cached", "warm")
    lines = []
    for setting in dict.fromkeys(name.split("/")[1] for name in rows if name.startswith("time/")):
        line = [setting, f"{rows[f'time/{setting}/in every step']['value']:.0f} ms"]
        for arm in arms:
            row, bound = rows[f"time/{setting}/{arm}"], rows.get(f"bound/{setting}/{arm}")
            own = spread(row, key="ratio")
            line.append(own if bound is None else f"{own} of {bound['value']:.2f}")
        lines.append(line)
    headings = ["", "in every step", *(f"{arm}: times faster" for arm in arms)]
    held = "; ".join(
        f"{name.split('/')[1]}: {row['value'] / 1e6:.1f} MB" for name, row in rows.items() if name.startswith("bytes/")
    )
    words = f"Two references of 32 by 32 pixels take, in the models above: {held}."
    return f"{markdown(headings, lines)}\n\n{words} {stamp(facts)}"


def h_transform() -> str:
    """How much more the frontier of the `vp` level dominates than every other method's."""
    facts, rows = load("h-transform")
    ours, start = "h, vp", "frontier against "
    names = [name.split("/") for name in rows if f"/{ours}/{start}" in name]
    others = list(dict.fromkeys(what.removeprefix(start) for *_, what in names))
    lines = []
    for kind, sampler in dict.fromkeys((kind, sampler) for kind, sampler, *_ in names):
        line = [kind if sampler == "deterministic" else f"{kind}, {sampler}"]
        line += [spread(rows.get(f"{kind}/{sampler}/{ours}/{start}{other}"), "+.0%") for other in others]
        lines.append(line)
    few, many = facts["sampler"]
    words = f"{facts['pictures']} pictures of each kind, {few} deterministic or {many} stochastic steps."
    return f"{verdicts(facts)}\n\n{markdown(['guide', *others], lines)}\n\n{words} {stamp(facts)}"


def h_transform_arms() -> str:
    """Fidelity and quality of every method at every strength."""
    _, rows = load("h-transform")
    parts = []
    places = [name.rsplit("/", 1)[0].split("/", 2) for name in rows if name.endswith("/kernel distance")]
    for kind, sampler in dict.fromkeys((kind, sampler) for kind, sampler, _ in places):
        lines = []
        for arm in [arm for *place, arm in places if place == [kind, sampler]]:
            own = {what: rows[f"{kind}/{sampler}/{arm}/{what}"] for what in ("PSNR", "feature distance")}
            quality = rows[f"{kind}/{sampler}/{arm}/kernel distance"]
            lines.append([arm, spread(own["PSNR"]), number(own["feature distance"]), number(quality, 4)])
        headings = [f"{kind}, {sampler}", "PSNR [95 %]", "feature distance", "kernel distance"]
        parts.append(markdown(headings, lines))
    return "\n\n".join(parts)


def h_transform_cost() -> str:
    """Time of every method over that of drawing without a guide."""
    facts, rows = load("h-transform-cost")
    guides = list(dict.fromkeys(name.split("/")[0] for name in rows))
    lines = []
    for method in dict.fromkeys(name.split("/")[1] for name in rows):
        lines.append([method, *(spread(rows.get(f"{guide}/{method}")) for guide in guides)])
    return f"{markdown(['times as long as without a guide', *guides], lines)}\n\n{stamp(facts)}"


TABLES: dict[str, Callable[[], str]] = {
    "bandpo": bandpo,
    "attention-matching": attention_matching,
    "attention-matching-options": attention_matching_options,
    "attention-matching-ablations": attention_matching_ablations,
    "attention-matching-needles": attention_matching_needles,
    "attention-matching-times": attention_matching_times,
    "flash-prefill-text": flash_prefill_text,
    "flash-prefill-tasks": flash_prefill_tasks,
    "flash-prefill-times": flash_prefill_times,
    "flash-prefill-synthetic": flash_prefill_synthetic,
    "flash-prefill-gpu": flash_prefill_gpu,
    "h-transform": h_transform,
    "h-transform-arms": h_transform_arms,
    "h-transform-cost": h_transform_cost,
    "klein-kv": klein_kv,
    "klein-kv-speed": klein_kv_speed,
    "kv-budget": kv_budget,
    "native-decode": native_decode,
    "native-decode-first": native_decode_first,
    "native-decode-billion": native_decode_billion,
    "noble": noble,
    "noble-cost-cpu": partial(noble_cost, "cpu"),
    "noble-cost-cuda": partial(noble_cost, "cuda"),
    "quantize": quantize,
    "sparse-bitnet-conversion": sparse_bitnet_conversion,
    "sparse-bitnet-kernels": sparse_bitnet_kernels,
    "sparse-bitnet-over-time": sparse_bitnet_over_time,
    "sparse-bitnet-training": sparse_bitnet_training,
    "quantize-load": quantize_load,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    given = parser.parse_args()
    stale = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        before = page.read_text()
        after = TABLE.sub(lambda found: f"{found[1]}\n{TABLES[found['name']]()}\n\n{found[3]}", before)
        if after != before:
            stale.append(page)
            if not given.check:
                page.write_text(after)
    for page in stale:
        print(f"{page.relative_to(ROOT)}: {'out of date' if given.check else 'written'}")
    if given.check and stale:
        sys.exit("The tables are not those of the results: run `python benchmarks/tables.py`.")


if __name__ == "__main__":
    main()
