"""An archive is converted within the memory bound, and nothing but the result is put on disk."""

from __future__ import annotations

import threading
from pathlib import Path

from tests.roundtrip import headers
from tests.roundtrip.fresh import measured

BOUND = 64 * 10**6


def on_disk(folder: Path) -> int:
    """Bytes taken by what is below the folder, holes apart; what vanishes meanwhile takes none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


class Watch(threading.Thread):
    """The most that a folder took while it was looked at."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.ended = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.01):
            self.most = max(self.most, on_disk(self.folder))


def test_large_archive_keeps_to_the_bound_and_needs_no_other_disk(tmp_path: Path) -> None:
    """hf -> nemo -> nemo of two stages, 150 MB in bf16, each in a fresh process."""
    config, shapes = headers.llama(6, hidden=1024, ffn=2816, heads=16, kv_heads=8, vocab=8000)
    source = headers.write(tmp_path / "hf", config, shapes)
    first, second = tmp_path / "first" / "a.nemo", tmp_path / "second" / "b.nemo"
    steps = [(source, first, "nemo", "{}"), (first, second, "nemo", '{"pp": 2}')]
    for src, dst, saver, layout in steps:
        dst.parent.mkdir()
        watch = Watch(dst.parent)
        watch.start()
        found = measured("convert", src, dst, saver, layout, BOUND)
        watch.ended.set()
        watch.join()
        assert found["written"] > 150 * 10**6
        assert found["peak"] <= BOUND
        assert watch.most <= dst.stat().st_size + 10**6
