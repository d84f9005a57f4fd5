"""Until when kept figures count: what they depend on, and whether what failed then runs by now."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

from lissom.evals.peers.arms import Arm
from lissom.evals.peers.compare import Comparison
from lissom.evals.peers.process import Failed, Worker, python_of

_PATIENCE = 30.0  # seconds for a Python to start and look its packages up


def identity(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """What figures of arms depend on besides model and machine, as plain values: their settings, the Python that runs
    each, and the versions of its packages there."""
    return [asdict(arm) | {"python": python_of(arm.runtime), "versions": versions(arm)} for arm in arms]


def stands(kept: Comparison, arms: Sequence[Arm], attempt: Callable[[Sequence[Arm]], Comparison]) -> bool:
    """Whether a comparison of `arms` that was kept is all that there is to know: what failed in it fails again.

    Args:
        attempt: tries some of them. Those that lack a package are not tried: once they have it, their `identity` is
            another.
    """
    failed = [arm for arm in arms if arm.name in kept.failed and None not in versions(arm).values()]
    return not failed or not attempt(failed).figures


def versions(arm: Arm) -> dict[str, str | None]:
    """Of an arm's packages in the Python that runs it; None for what is not installed there."""
    return _versions(arm.runtime, arm.packages)


@cache
def _versions(runtime: str, packages: tuple[str, ...]) -> dict[str, str | None]:
    try:
        with Worker(runtime, 1, time.monotonic() + _PATIENCE) as worker:
            found: dict[str, str | None] = worker.ask("versions", packages=packages)["versions"]
            return found
    except Failed:
        return dict.fromkeys(packages)
