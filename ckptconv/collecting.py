"""When Python looks for garbage: not while very many objects are made that all live on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collecting() -> Iterator[None]:
    """Cyclic garbage collection off inside; it would look through every recipe again and again, and find nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # what others froze stays so
                gc.freeze()  # and back: all that was made counts as old, and the next look at new objects does not take it for new
                gc.unfreeze()
            gc.enable()


@contextmanager
def old_ones_kept() -> Iterator[None]:
    """Collection inside looks at new objects only: a plan of many tensors is there to stay, and costs a second to look through."""
    ours = not gc.get_freeze_count()
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()
