"""Bytes as people write them."""

from __future__ import annotations

import re

from lissom.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: int | str) -> int:
    """Bytes from a number or from text such as '64MB' or '1.5 GiB'.

    Raises:
        UserError: it is neither, or not positive.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMG]?I?B?)", str(text).strip().upper())
    unit = _UNITS.get(match[2] if match and match[2].endswith("B") else f"{match[2]}B" if match and match[2] else "")
    if match is None or unit is None or not 1 <= float(match[1]) * unit < 2**62:
        raise UserError(f"{text!r} is no size: expected bytes or text such as '64MB' or '1.5GiB'.")
    return int(float(match[1]) * unit)
