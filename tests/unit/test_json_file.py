"""JSON of others: damage and ambiguity are refused, and the file is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptconv.containers import json_file
from ckptconv.errors import FormatError


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b"[1]", "list"),
        (b"", "JSON"),
        (b'{"a": 1', "JSON"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"a":' * 100000, "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
    ],
    ids=["twice", "nan", "infinity", "list", "empty", "cut", "encoding", "deep", "digits"],
)
def test_damaged_json_is_refused(text: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(FormatError, match=named) as info:
        json_file.read(path)
    assert str(path) in str(info.value)


def test_oversized_json_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(FormatError, match="1000000000000 bytes"):
        json_file.read(path)
