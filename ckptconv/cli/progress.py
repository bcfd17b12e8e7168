"""Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from ckptconv.sizes import human


class Bar:
    """A tqdm bar: bytes, rate and time left."""

    def __init__(self) -> None:
        self.bar: Any = None

    def start(self, total_bytes: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)

    def advance(self, nbytes: int) -> None:
        self.bar.update(nbytes)

    def done(self) -> None:
        self.bar.close()


class Lines:
    """One line at most every `every` seconds, for logs."""

    def __init__(self, every: float = 10.0) -> None:
        self.every, self.total, self.moved = every, 0, 0
        self.began = self.told = time.monotonic()
        self.lock = threading.Lock()

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes
        self.began = self.told = time.monotonic()

    def advance(self, nbytes: int) -> None:
        with self.lock:
            self.moved += nbytes
            now = time.monotonic()
            if now - self.told < self.every:
                return
            self.told = now
            rate = self.moved / (now - self.began)
            left = (self.total - self.moved) / rate if rate else 0
        print(f"{human(self.moved)} of {human(self.total)}, {human(rate)}/s, {left:.0f} s left", file=sys.stderr)

    def done(self) -> None:
        pass


def progress(*, quiet: bool) -> Bar | Lines | None:
    if quiet:
        return None
    return Bar() if sys.stderr.isatty() else Lines()
