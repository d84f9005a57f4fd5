"""Native decode against what one would use instead. The same comparison as `lissom check native-decode`, also for other
numbers of threads.

A killed run goes on behind the last part that was measured, unless lissom was changed since. Runtimes that another
Python has are used where LISSOM_LLAMA_CPP_PYTHON, LISSOM_OPENVINO_PYTHON or LISSOM_ONNXRUNTIME_PYTHON names it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from lissom.cli.bench import numbers
from lissom.cli.common import bars
from lissom.evals.checks import native_decode as study
from lissom.report.checks import native_decode as report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short contexts and a smaller model, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--threads", metavar="N,N", help="numbers of threads [default: 1 and all]")
    parser.add_argument("--journal", type=Path, default=Path("lissom-check/native-decode.jsonl"))
    given = parser.parse_args()
    counts = numbers("--threads", given.threads) if given.threads else ()
    with bars(Console(stderr=True)) as bar:
        tasks = {stage: bar.add_task(stage, total=None) for stage in study.STAGES}
        run = study.run(
            "smollm2-135m",
            "quick" if given.quick else "default",
            given.journal,
            lambda stage, done, total: bar.update(tasks[stage], completed=done, total=total),
            counts,
        )
    result = report.result(run)
    if given.json:
        result.write(given.json)
    if given.json != "-":
        out = Console()
        for table in report.tables(run):
            out.print(table)
        for claim in result.claims:
            out.print(f"[bold]{claim.verdict}[/bold]: {claim.claim}", highlight=False)
        for name, reason in result.facts["failed"].items():
            out.print(f"Not measured: {name}: {reason}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
