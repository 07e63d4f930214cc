"""Batches on their way to the device while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ogreg_core.data.loader import TrainBatch

__all__ = ["on_device"]


def on_device(batches: Iterator[TrainBatch], device: torch.device) -> Iterator[TrainBatch]:
    """The same batches with clips, labels and times on the device, on CUDA copied one ahead on a stream of
    their own; on a CPU they are there already.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    ahead: tuple[TrainBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = batch._replace(
                clips=batch.clips.to(device, non_blocking=True),
                labels=batch.labels.to(device, non_blocking=True),
                times=None if batch.times is None else batch.times.to(device, non_blocking=True),
            )
            copied = stream.record_event()
        if ahead is not None:
            yield _arrived(*ahead, device)
        ahead = moved, copied
    if ahead is not None:
        yield _arrived(*ahead, device)


def _arrived(batch: TrainBatch, copied: torch.cuda.Event, device: torch.device) -> TrainBatch:
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in (batch.clips, batch.labels, batch.times):
        # Its memory belongs to the other stream, which must not give it away before it was read.
        if tensor is not None:
            tensor.record_stream(current)
    return batch
