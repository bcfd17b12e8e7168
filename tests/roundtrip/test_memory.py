"""Whole conversions keep to the memory bound, and a model four times the size takes no more."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.roundtrip import headers
from tests.roundtrip.fresh import measured

BOUND = 64 * 10**6
SIZES = {"small": (4, 100 * 10**6), "large": (16, 400 * 10**6)}


class Peaks(NamedTuple):
    """VmHWM of the process that wrote rank files, and of the one that read them."""

    there: float
    back: float


def peaks_of(folder: Path, layers: int, nbytes: int) -> Peaks:
    """hf -> mcore tp2 pp2 -> hf of a bf16 Llama whose weights are holes, each in a fresh process, held to the bound."""
    config, shapes = headers.llama(layers, hidden=1024, ffn=2816, heads=16, kv_heads=8, vocab=8000)
    source = headers.write(folder / "hf", config, shapes)
    there, back = folder / "mcore", folder / "back"
    steps = [(source, there, "mcore", '{"tp": 2, "pp": 2}'), (there, back, "hf", "{}")]
    peaks = []
    for src, dst, saver, layout in steps:
        found = measured("convert", src, dst, saver, layout, BOUND)
        assert found["written"] > nbytes
        assert found["peak"] < 60 * 10**6 + BOUND + 2_000 * found["tensors"]
        peaks.append(found["peak"])
    return Peaks(*peaks)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Peaks]:
    return {name: peaks_of(tmp_path_factory.mktemp(name), *size) for name, size in SIZES.items()}


def test_conversions_keep_to_the_memory_bound(peaks: dict[str, Peaks]) -> None:
    assert max(peaks["large"]) <= BOUND, "the process as a whole, which is more than is asked"


def test_memory_is_flat_in_model_size(peaks: dict[str, Peaks]) -> None:
    assert peaks["large"].there < peaks["small"].there + 4 * 10**6
    assert peaks["large"].back < peaks["small"].back + 4 * 10**6
