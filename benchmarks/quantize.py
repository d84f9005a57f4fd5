"""What low-bit weights cost, beside llama.cpp's own quantisers, and how fast they load: `lissom check quantize`.

llama.cpp is found where LISSOM_LLAMA_CPP_PYTHON names a Python that has llama-cpp-python; without it its arms are left
out. Loading is measured last: to measure it again on a quieter machine, remove the journal's line that says so.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from lissom.cli.check import journal_of, measured, show
from lissom.evals.checks import quantize as study
from lissom.models.load import DEFAULT_MODEL
from lissom.report.checks.quantize import CHECK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rounding only, two windows, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--journal", type=Path, default=journal_of("quantize"))
    given = parser.parse_args()
    measure = partial(CHECK.measure, study.QUICK if given.quick else study.DEFAULT)
    show(measured(CHECK.stages, measure, DEFAULT_MODEL, given.journal), given.json)


if __name__ == "__main__":
    main()
