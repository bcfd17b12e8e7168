"""All that is wrong with a file, in one error."""

from __future__ import annotations

from ckptconv.errors import FormatError

MAX_LISTED = 1000


def fail(where: object, problems: list[str]) -> None:
    """Raise one error that lists them all, if there are any."""
    if len(problems) == 1:
        raise FormatError(where, problems[0])
    if problems:
        more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        listed = "\n  ".join([*problems[:MAX_LISTED], *more])
        raise FormatError(where, f"{len(problems)} things are wrong:\n  {listed}")
