"""How much memory a piece of work takes."""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
from pathlib import Path

import torch

__all__ = ["PeakMeter", "available_mb", "peak_memory_mb"]

_RESET_PEAK = "5"


def peak_memory_mb(device: torch.device) -> float:
    """Peak megabytes so far: allocated on the GPU, or resident in this process on a CPU; not a
    number where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class PeakMeter:
    """The most memory that is in use from now on.

    By how much it rises above what it is now, so that neither weights nor other models that are there
    already are in it: on a GPU what torch has allocated, on a CPU the resident set of this process. The
    kernel's own high-water mark is set back for that, which Linux alone can do.

    Args:
        device: whose memory.
        folder: the kernel's account of this process.
    """

    def __init__(self, device: torch.device, folder: Path = Path("/proc/self")) -> None:
        self._device = device
        self._status = folder / "status"
        self._floor: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._floor = torch.cuda.memory_allocated(device) / 2**20
            return
        _return_free_memory()
        with contextlib.suppress(OSError):
            (folder / "clear_refs").write_text(_RESET_PEAK)
            self._floor = self._megabytes("VmRSS")

    @staticmethod
    def meaning_on(device: torch.device) -> str:
        """What the figure is, in words."""
        return f"rise of the {'allocated' if device.type == 'cuda' else 'resident'} memory"

    def peak_mb(self) -> float | None:
        """Megabytes since the meter was made; None where the system cannot tell."""
        if self._device.type == "cuda":
            assert self._floor is not None
            return torch.cuda.max_memory_allocated(self._device) / 2**20 - self._floor
        peak = None if self._floor is None else self._megabytes("VmHWM")
        if self._floor is None or peak is None:
            return None
        return max(peak - self._floor, 0.0)

    def _megabytes(self, name: str) -> float | None:
        for line in self._status.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 2**10
        return None


def _return_free_memory() -> None:
    """Freed memory that the C library has kept would not be seen to be taken again."""
    if sys.platform == "linux":
        # AttributeError: a C library other than glibc.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def available_mb(device: torch.device) -> float:
    """Memory that this process may still take; infinite where the system does not tell, and on a GPU,
    which says no by itself.
    """
    found = math.inf
    if device.type == "cuda":
        return found
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = int(line.split()[1]) / 2**10
    group = Path("/sys/fs/cgroup")
    # ValueError: "max", no limit.
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        # Cached files give way where memory is needed.
        reclaimable = 0
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                reclaimable = int(line.split()[1])
        found = min(found, (limit - used + reclaimable) / 2**20)
    return found
