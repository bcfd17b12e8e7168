"""Calls of the operating system that Python has no name for; each says when it is not there, none pretends."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import lru_cache

_AT_FDCWD = -100
_EXCHANGE = 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def allocate(fd: int, nbytes: int) -> None:
    """Give a file its size and its blocks, so that a full disk is known now; only its size where that is not supported.

    Never posix_fallocate: where the file system cannot, libc writes a byte into every block instead.
    """
    if nbytes and (call := _function("fallocate")) is not None:
        while call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
            code = ctypes.get_errno()
            if code in _FULL:
                raise OSError(code, os.strerror(code))
            if code != errno.EINTR:
                break
    os.ftruncate(fd, nbytes)


def sync_file_system(fd: int) -> bool:
    """Make everything on the file system of `fd` durable; False where there is no such call."""
    call = _function("syncfs")
    if call is None:
        return False
    if call(fd):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return True


def exchange(a: str, b: str) -> bool:
    """Swap two names in one step; False where that is not supported."""
    call = _function("renameat2")
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), a, None, b)


@lru_cache
def _function(name: str) -> ctypes._NamedFuncPointer | None:
    try:
        found: ctypes._NamedFuncPointer = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError):
        return None
    return found
