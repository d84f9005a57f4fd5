"""Native decode against what one would use instead. The same comparison as `lissom check native-decode`, also for other
numbers of threads.

A killed run goes on behind the last part that was measured, unless lissom was changed since. Runtimes that another
Python has are used where LISSOM_LLAMA_CPP_PYTHON, LISSOM_OPENVINO_PYTHON or LISSOM_ONNXRUNTIME_PYTHON names it."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from lissom.cli.bench import numbers
from lissom.cli.check import journal_of, measured, show
from lissom.models.load import DEFAULT_MODEL
from lissom.report.checks.native_decode import CHECK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short contexts and a smaller model, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--threads", metavar="N,N", help="numbers of threads [default: 1 and all]")
    parser.add_argument("--journal", type=Path, default=journal_of("native-decode"))
    given = parser.parse_args()
    counts = numbers("--threads", given.threads) if given.threads else ()
    measure = partial(CHECK.measure, "quick" if given.quick else "default", counts)
    show(measured(CHECK.stages, measure, DEFAULT_MODEL, given.journal), given.json)


if __name__ == "__main__":
    main()
