"""Importing torch faster."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """While active, no garbage is looked for; what was made meanwhile is not looked through later either.

    Importing torch makes a million objects that live as long as the process. The collector goes through
    them again and again, which is a fifth of the time of the import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
