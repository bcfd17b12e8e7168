"""Sizes are read as huggingface_hub reads them, and told with GB = 10⁹."""

from __future__ import annotations

import pytest

from ckptconv.errors import UsageError
from ckptconv.sizes import human, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("0.5 MB", 500_000), ("1kb", 1000), ("2TB", 2 * 10**12), ("64mb", 64 * 10**6), ("123", 123)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "GB", "5GiB", "-1GB", "0GB", "nanGB", "infGB", "xMB", "1e3MB", "5 5MB", "0.1B"])
def test_wrong_size_is_a_usage_error_naming_the_flag(text: str) -> None:
    with pytest.raises(UsageError, match="--memory"):
        parse_size(text, "--memory")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (3.6e9, "3.60 GB"), (5e12, "5000.00 GB")]
)
def test_human(nbytes: float, text: str) -> None:
    assert human(nbytes) == text
