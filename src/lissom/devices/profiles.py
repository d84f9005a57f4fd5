"""Device profiles: for this machine times are as measured; for another they are predicted from its measured rates."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from lissom.devices.machine import describe, measure_bandwidth, measure_gemm
from lissom.errors import UserError


class Timed(Protocol):
    """What was measured here."""

    @property
    def first_token(self) -> float: ...

    @property
    def decode(self) -> float: ...


@dataclass(frozen=True)
class Profile:
    """A device, and how its speed relates to this machine's.

    Attributes:
        name: for the report.
        compute: its fp32 matrix rate over this machine's; reading a prompt is bound by it.
        bandwidth: its memory read rate over this machine's; decoding is bound by it.
        measured: whether the times were measured on the device itself; otherwise they are predictions.
    """

    name: str
    compute: float = 1.0
    bandwidth: float = 1.0
    measured: bool = True

    @classmethod
    def this(cls) -> Self:
        """This machine."""
        machine = describe()["machine"]
        return cls(machine["cpu"])

    @classmethod
    def load(cls, name: str) -> Self:
        """`this`, or the file that `lissom doctor --json FILE` wrote on another device.

        Raises:
            UserError: the file is missing or was not written by `lissom doctor`.
        """
        if name == "this":
            return cls.this()
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"There is no device profile {name!r}. Write one on that device with `lissom doctor --json FILE`, "
                "or use --device this."
            )
        try:
            facts = json.loads(path.read_text())
            machine, rates = facts["machine"], facts["measured"]
            return cls(
                name=str(machine["cpu"]),
                compute=float(rates["gemm_fp32_gflop_s"]) / measure_gemm(torch.float32),
                bandwidth=float(rates["read_bandwidth_gb_s"]) / measure_bandwidth(),
                measured=False,
            )
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise UserError(f"{name} is no device profile: write one with `lissom doctor --json FILE`.") from error

    def first_token(self, timed: Timed) -> float:
        """Seconds to the first token on the device."""
        return timed.first_token / self.compute

    def decode(self, timed: Timed) -> float:
        """Seconds per further token on the device."""
        return timed.decode / self.bandwidth

    def facts(self) -> dict[str, Any]:
        """For results: what the times of this report are."""
        return {"device": self.name, "times": "measured" if self.measured else "predicted from measured rates"}
