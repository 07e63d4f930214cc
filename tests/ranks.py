"""Several processes of one job for tests: forked from a server that has torch loaded, so that a start
costs no import.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from multiprocessing.queues import Queue
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torchvision.transforms.v2", "matplotlib.figure", "ogreg_core.training.assemble"]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False


def all_ended(pids: Sequence[int], seconds: float = 60) -> bool:
    """Whether none is alive any more, after waiting so long at the most."""
    deadline = time.monotonic() + seconds
    while (some := any(map(alive, pids))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not some


def _be(
    rank: int, size: int, port: int, function: Callable[..., Any], arguments: Any, found: Queue[Any]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        found.put((rank, function(*arguments), None))
    except BaseException:
        found.put((rank, None, traceback.format_exc()))
        raise


def start(
    size: int, function: Callable[..., Any], *arguments: Any
) -> tuple[list[ForkServerProcess], Queue[Any]]:
    """Start ``function(*arguments)`` in ``size`` processes that see a launcher's environment."""
    port = free_port()
    found: Queue[Any] = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_be, args=(rank, size, port, function, arguments, found))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, found


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of ``size`` processes by rank; an error of one fails the test."""
    processes, found = start(size, function, *arguments)
    results = {}
    for _ in processes:
        rank, result, error = found.get(timeout=200)
        assert error is None, f"rank {rank}: {error}"
        results[rank] = result
    for process in processes:
        process.join()
    return [results[rank] for rank in range(size)]
