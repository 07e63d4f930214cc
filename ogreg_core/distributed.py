"""The processes of one job: who this one is, and the few things that they tell each other.

Launchers (``torchrun``, ``ogreg train --gpus``, SLURM through torchrun) describe the job in the
environment; nothing of it is ever typed. Without a launcher the job is this process alone and
every exchange is the identity, so that callers need no second path.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ogreg_core.devices import pick_device
from ogreg_core.errors import EnvironmentFault
from ogreg_core.launching import is_launched, restarts

__all__ = ["SINGLE", "World", "join"]

Item = TypeVar("Item")

# How long a process waits for the others to start.
_ARRIVAL = timedelta(minutes=5)
# And in the middle of the work: longer than rendering, fetching weights or one slow batch.
_PATIENCE = timedelta(hours=1)


@dataclass(frozen=True)
class World:
    """The processes of a job.

    Every exchange is collective: all processes must make the same calls in the same order.

    Args:
        rank: number of this process.
        size: how many there are.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=_exchange_device())
        dist.all_reduce(total)
        return cast(list[float], total.tolist())

    def gather(self, item: Item) -> list[Item]:
        """What every process holds, by rank, on every process; must be picklable."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Item) -> Item:
        """What the main process holds, on every process; must be picklable."""
        if self.size == 1:
            return item
        box: list[Any] = [item]
        dist.broadcast_object_list(box, src=0)
        return cast(Item, box[0])

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


SINGLE = World()


def _exchange_device() -> torch.device:
    # NCCL moves nothing but CUDA tensors.
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def join(device: str = "auto") -> Iterator[tuple[World, torch.device]]:
    """Take this process's place in its job, for the duration of the context.

    Args:
        device: as on the command line; with ``auto`` or ``cuda`` each process of a machine takes the
            GPU of its local rank.

    Yields:
        The processes, and the device of this one. NCCL connects GPUs, gloo CPUs.

    Raises:
        EnvironmentFault: the device is not there, or not all processes arrive.
    """
    if not is_launched():
        yield SINGLE, pick_device(device)
        return
    world = World(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0))
    )
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{world.local_rank}"
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    try:
        store = _meet(world)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=_PATIENCE,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise EnvironmentFault(
            f"process {world.rank} of {world.size} could not join the others",
            where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            why=(str(error).splitlines() or [type(error).__name__])[0],
            fix="check that every machine was started with the same address, port and number of processes",
        ) from error
    try:
        yield world, chosen
    finally:
        dist.destroy_process_group()


def _meet(world: World) -> dist.Store:
    """The store through which the processes find each other, once all have said that they are here.

    Raises:
        EnvironmentFault: names the processes that did not come.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    everything = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world.size,
        is_master=world.is_main and not agent,
        timeout=_ARRIVAL,
        wait_for_workers=False,
    )
    # torchrun keeps its store when it starts the job anew, with the addresses of the dead in it.
    store = dist.PrefixStore(f"ogreg/{restarts()}", everything)
    names = [f"here/{rank}" for rank in range(world.size)]
    store.set(names[world.rank], socket.gethostname())
    try:
        store.wait(names, _ARRIVAL)
    except RuntimeError as error:
        missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        raise EnvironmentFault(
            f"process {', '.join(missing)} of {world.size} never arrived",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            why=f"waited for {_ARRIVAL.total_seconds():.0f} s",
            fix="look for an error of theirs above, or in the output of their machines",
        ) from error
    return store
