"""FlashPrefill beside SDPA and beside its own kernel with all blocks: `lissom check flash-prefill`.

What is measured is kept one by one: to time a part again on a quieter machine, remove its line from the journal.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from lissom.cli.check import journal_of, measured, show
from lissom.evals.checks import flash_prefill as study
from lissom.models.load import DEFAULT_MODEL
from lissom.report.checks.flash_prefill import CHECK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1536 tokens, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    parser.add_argument("--journal", type=Path, default=journal_of("flash-prefill"))
    given = parser.parse_args()
    measure = partial(CHECK.measure, study.QUICK if given.quick else study.DEFAULT)
    show(measured(CHECK.stages, measure, DEFAULT_MODEL, given.journal), given.json)


if __name__ == "__main__":
    main()
