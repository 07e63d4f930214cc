"""What a launcher says in the environment. Imports nothing heavy: commands ask before torch is loaded."""

from __future__ import annotations

import os

__all__ = ["is_launched", "is_silent", "restarts_are_watched"]


def is_launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_silent() -> bool:
    """Whether another process of the job speaks for this one."""
    return is_launched() and os.environ["RANK"] != "0"


def restarts_are_watched() -> bool:
    """Whether torchrun started this process, and would start it anew after a process has died."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and "RANK" in os.environ
