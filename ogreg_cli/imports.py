"""Importing torch faster."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """While active, no garbage is looked for; what was made meanwhile is not looked through later either.

    Importing torch makes a million objects that live as long as the process. The collector goes through
    them again and again, and once more at the end of the process: a third of the processor time of
    ``import torch``.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Triton's bindings call what is not collected at the end leaks, on many lines.
        if "triton" not in sys.modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
