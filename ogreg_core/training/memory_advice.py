"""What to lower when a training does not fit into memory, the cheapest first."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import torch

from ogreg_core.errors import OutOfMemory

__all__ = ["out_of_memory"]

_SMALLEST_SIZE = 32


def out_of_memory(
    *,
    videos: int,
    repeats: int,
    frames: int,
    size: int,
    accumulate: int,
    checkpoint_stages: Sequence[int],
    precision: str,
    peak_bytes: int,
    device: torch.device,
    stages: int = 4,
    why: str = "",
) -> OutOfMemory:
    """The error for a micro-batch that did not fit, with the next recipe overrides to try.

    Args:
        videos: per micro-batch.
        repeats: clips of each.
        frames, size: of a clip.
        accumulate: micro-batches per step.
        checkpoint_stages: stages whose activations are recomputed already.
        precision: as resolved: ``fp32``, ``tf32``, ``bf16`` or ``fp16``.
        peak_bytes: most memory that was in use; 0 if unknown.
        device: whose memory it was.
        stages: of the model.
        why: what else is known; comes after the bytes.
    """
    clips = videos * repeats
    same, other = [], []
    # Mixup and cutmix need a partner, and shares of even length to keep the partners of the batch.
    shares = [n for n in range(2, videos + 1) if videos % n == 0 and clips // n > 1]
    even = [n for n in shares if videos // n % 2 == 0]
    if shares:
        effect = "the same step" + ("" if even else " but for the pairs of mixup and cutmix")
        parts = min(even or shares)
        same.append((f"train.accumulate={accumulate * parts}", f"{effect}, nearly as fast"))
    everywhere = list(range(1, stages + 1))
    if set(checkpoint_stages) < set(everywhere):
        numbers = ",".join(map(str, everywhere))
        same.append((f"train.checkpoint_stages=[{numbers}]", "the same step, about a third slower"))
    if device.type == "cuda" and precision in ("fp32", "tf32"):
        same.append(("train.precision=bf16", "nearly the same, and faster"))
    if frames > 1:
        other.append((f"data.frames={frames // 2}", "another experiment"))
    smaller = max(size * 3 // 4 // 32 * 32, _SMALLEST_SIZE)
    if smaller < size:
        other.append((f"data.size={smaller}", "another experiment"))
    used = [f"{peak_bytes / 2**30:.1f} GB were in use"] if peak_bytes else []
    return OutOfMemory(
        f"{'the GPU' if device.type == 'cuda' else 'this machine'} has too little memory for "
        f"{clips} clip{'s' if clips > 1 else ''} of {frames} x {size} x {size} at once",
        where=str(device),
        why="; ".join([*used, *([why] if why else [])]),
        fix="\n".join(f"{shlex.quote(key)} ({effect})" for key, effect in [*same, *other]),
    )
