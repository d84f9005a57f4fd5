"""The one shape of everything measured, as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lissom.devices.machine import describe
from lissom.files import write_json


@dataclass(frozen=True)
class Row:
    """One figure. `ratio` = ours against `baseline`, better above 1; `low`, `high` = its interval; n = units."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True)
class Claim:
    """What a check says: the claim, where it was made, and whether it `holds`, is `weaker` or `does not hold`."""

    claim: str
    source: str
    verdict: str


@dataclass(frozen=True)
class Result:
    """A measurement with everything that is needed to judge it."""

    name: str
    rows: list[Row]
    claims: list[Claim] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=describe)

    def to_dict(self) -> dict[str, Any]:
        rows, claims = [asdict(row) for row in self.rows], [asdict(claim) for claim in self.claims]
        return {"name": self.name, **self.facts, "rows": rows, **({"claims": claims} if claims else {})}

    def write(self, target: str) -> None:
        """Write JSON to a file, atomically, or to standard output where `target` is '-'."""
        write_json(self.to_dict(), target)
