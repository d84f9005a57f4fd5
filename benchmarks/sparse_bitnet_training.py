"""What 2:4 sparsity costs ternary and floating point models, trained from scratch, and what is left of a model that is
made ternary with itself as the teacher: `lissom check sparse-bitnet`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from lissom.cli.check import journal_of, measured, show
from lissom.evals.checks import sparse_bitnet as study
from lissom.models.load import DEFAULT_MODEL
from lissom.report.checks.sparse_bitnet import CHECK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the main arms for a few steps, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--journal", type=Path, default=journal_of("sparse-bitnet"))
    given = parser.parse_args()
    measure = partial(CHECK.measure, study.QUICK if given.quick else study.DEFAULT)
    show(measured(CHECK.stages, measure, DEFAULT_MODEL, given.journal), given.json)


if __name__ == "__main__":
    main()
