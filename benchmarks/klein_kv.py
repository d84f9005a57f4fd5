"""What a cache of references saves: times of drawing a picture beside the bound that the operations set.

In every step, with the references masked or not; by diffusers' own cache; cached by lissom; and warm, read before.
"""

from __future__ import annotations

import argparse

from rich.console import Console

from lissom.evals.checks.klein_kv import DEFAULT
from lissom.evals.reference_speed import Setting, speeds
from lissom.report.checks.klein_kv import speed_claims, speed_rows, speed_table
from lissom.report.rows import Result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one and two references, four steps")
    parser.add_argument("--json", metavar="FILE", help="write the result ('-': standard output)")
    given = parser.parse_args()
    settings, rounds = ((Setting(1, 4), Setting(2, 4)), 3) if given.quick else (DEFAULT.settings, DEFAULT.rounds)
    seconds = speeds(settings, rounds)
    result = Result("klein-kv-speed", list(speed_rows(seconds)), list(speed_claims(seconds)))
    if given.json:
        result.write(given.json)
    if given.json != "-":
        Console().print(speed_table(seconds))
        for claim in result.claims:
            print(f"{claim.verdict}: {claim.claim}")


if __name__ == "__main__":
    main()
