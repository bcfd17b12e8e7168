"""Sizes in bytes as people write and read them: 64MB, 1.5GB; GB = 10⁹."""

from __future__ import annotations

import math
import re

from ckptconv.errors import UsageError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str, flag: str) -> int:
    """A size in bytes; a usage error naming `flag` when it is none."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else None
    size = float(match[1]) * UNITS[unit] if match and unit in UNITS else 0.0
    if not 1 <= size < math.inf:
        raise UsageError(f"{flag} {text}: expected a number and one of KB, MB, GB, TB, such as 5GB")
    return int(size)


def human(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    raise AssertionError
