"""The files being written: the only way bytes go out. Few are open at a time; another kind of storage goes in here."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

from ckptconv.executor.system import allocate, sync_file_system
from ckptconv.plan import File

OPEN_OUTPUTS = 128
MANY = 64  # from here on one flush of the whole file system is cheaper than one for each file


@dataclass(slots=True)
class _Handle:
    """An open file, and how many threads are at it now."""

    fd: int
    users: int = 0


class Outputs:
    """Files below `root`, by their number in the plan; any thread may write to any of them."""

    def __init__(self, root: str, files: Sequence[File], durable: bool = True) -> None:
        self.root, self._files, self._durable = root, files, durable
        self._lock = Lock()
        self._open: OrderedDict[int, _Handle] = OrderedDict()
        self.written = 0

    def path(self, number: int) -> str:
        return f"{self.root}/{self._files[number].path}"

    def whole(self, number: int) -> bool:
        """Whether the file is there and has its size."""
        try:
            return os.stat(self.path(number)).st_size == self._files[number].size
        except FileNotFoundError:
            return False

    def create(self, number: int) -> None:
        """Make the file, with its full size."""
        try:
            with self._use(number) as fd:
                allocate(fd, self._files[number].size)
        except OSError as error:
            error.filename = self.path(number)
            raise

    def write_at(self, number: int, data: memoryview, offset: int) -> None:
        handle, left = self._take(number), data
        try:
            while left:
                n = os.pwrite(handle.fd, left, offset)
                left, offset = left[n:], offset + n
        except OSError as error:
            error.filename = self.path(number)
            raise
        finally:
            self._give(handle, len(data) - len(left))

    def sync(self, numbers: Collection[int]) -> None:
        """Make what was written to these files durable."""
        if not self._durable or not numbers:
            return
        if len(numbers) >= MANY:
            with self._use(next(iter(numbers))) as fd:
                if sync_file_system(fd):
                    return
        for number in sorted(numbers):
            try:
                with self._use(number) as fd:
                    os.fdatasync(fd)
            except OSError as error:
                error.filename = self.path(number)
                raise

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].fd)

    @contextmanager
    def _use(self, number: int) -> Iterator[int]:
        """The file's descriptor, safe from being closed for another file's sake meanwhile."""
        handle = self._take(number)
        try:
            yield handle.fd
        finally:
            self._give(handle)

    def _take(self, number: int) -> _Handle:
        """To be given back; till then it stays open."""
        with self._lock:
            handle = self._open.get(number)
            if handle is None:
                handle = self._open[number] = _Handle(os.open(self.path(number), os.O_RDWR | os.O_CREAT, 0o644))
                self._evict()
            else:
                self._open.move_to_end(number)
            handle.users += 1
            return handle

    def _give(self, handle: _Handle, written: int = 0) -> None:
        with self._lock:
            handle.users -= 1
            self.written += written

    def _evict(self) -> None:
        if len(self._open) <= OPEN_OUTPUTS:
            return
        for number, handle in self._open.items():
            if not handle.users and number != next(reversed(self._open)):
                os.close(handle.fd)
                del self._open[number]
                return


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: str, parts: Iterator[bytes], durable: bool) -> None:
    """A small file as a whole."""
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        if durable:
            os.fsync(file.fileno())
