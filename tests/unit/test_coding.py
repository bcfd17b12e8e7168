"""Compressed byte ranges that lie in the middle of a file, as in an archive."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from ckptconv import coding
from ckptconv.dtypes import FP32
from ckptconv.leaves import contiguous
from ckptconv.source import Source

DATA = np.arange(100, dtype=np.float32)


def test_a_range_is_decoded_where_it_lies(tmp_path: Path) -> None:
    packed = zlib.compress(DATA.tobytes())
    (tmp_path / "archive").write_bytes(b"something before" + packed + b"something after")
    range_ = Source(str(tmp_path / "archive"), 16, len(packed))
    tensor = contiguous(coding.coded(range_, "zlib", DATA.nbytes), (100,), FP32)
    np.testing.assert_array_equal(tensor.numpy(), DATA)
    np.testing.assert_array_equal(tensor.narrow(0, 40, 60).numpy(), DATA[40:60])
