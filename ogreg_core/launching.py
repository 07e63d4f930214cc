"""What a launcher says in the environment. Imports nothing heavy: commands ask before torch is loaded."""

from __future__ import annotations

import os

__all__ = ["is_launched", "is_silent", "launch_id", "restarts"]


def is_launched() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_silent() -> bool:
    """Whether another process of the job speaks for this one."""
    return is_launched() and os.environ["RANK"] != "0"


def launch_id() -> str:
    """A name of the job that stays the same when torchrun starts it anew; empty without a launcher."""
    if not is_launched():
        return ""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name != "none":
        return name
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def restarts() -> int:
    """How often torchrun has started the job anew after a process died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
