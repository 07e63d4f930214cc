"""The processes of one job: who this one is, and the few things that they tell each other.

Launchers (``torchrun``, ``ogreg train --gpus``, SLURM through torchrun) describe the job in the
environment; nothing of it is ever typed. Without a launcher the job is this process alone and
every exchange is the identity, so that callers need no second path.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from ogreg_core.devices import pick_device
from ogreg_core.errors import EnvironmentFault, OgregError, UsageError
from ogreg_core.launching import is_launched, restarts_are_watched

__all__ = ["SINGLE", "World", "join"]

Item = TypeVar("Item")

# How long a process waits for the others to start.
_ARRIVAL = timedelta(minutes=5)
# And in the middle of the work: longer than rendering, fetching weights or one slow batch.
_PATIENCE = timedelta(hours=1)
_ASK_SECONDS = 0.05


@dataclass(frozen=True)
class World:
    """The processes of a job.

    Every exchange is collective: all processes must make the same calls in the same order.

    Args:
        rank: number of this process.
        size: how many there are.
        local_rank: number of this process on its machine.
        store: torchrun's, which outlives the processes that it starts anew; None without it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: dist.Store | None = field(default=None, compare=False, repr=False)

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

    def on_main(self, work: Callable[[], Item]) -> Item:
        """The result of work that only the main process does, on every process; picklable.

        Raises:
            OgregError: what the work raised, on every process, so that none waits for ever.
        """
        result: Item | None = None
        error: OgregError | None = None
        if self.is_main:
            try:
                result = work()
            except OgregError as raised:
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return cast(Item, result)

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def remember(self, name: str, value: str) -> None:
        """Leave a note for processes that torchrun starts in the place of these."""
        if self.store is not None:
            self.store.set(f"ogreg/notes/{name}", value)

    def recall(self, name: str) -> str | None:
        """What processes of this job that have died left under this name."""
        if self.store is None or not self.store.check([f"ogreg/notes/{name}"]):
            return None
        return self.store.get(f"ogreg/notes/{name}").decode()


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
        UsageError: one GPU by its number for several processes.
        EnvironmentFault: the device is not there, or not all processes arrive within five minutes.
    """
    if not is_launched():
        store = _connect(is_host=False) if restarts_are_watched() else None
        yield (World(store=store) if store is not None else SINGLE), pick_device(device)
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    chosen = _own_device(device, local_rank)
    store = _connect(is_host=rank == 0 and not restarts_are_watched())
    world = World(rank, size, local_rank, store if restarts_are_watched() else None)
    try:
        meeting = dist.PrefixStore(f"ogreg/{_meet(store, rank, size)}", store)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=meeting,
            rank=rank,
            world_size=size,
            timeout=_PATIENCE,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise _not_joined(f"process {rank} of {size} could not join the others", error) from error
    yield world, chosen
    # Not after an error: others may still wait for this process, whose end tells the launcher.
    dist.destroy_process_group()


def _own_device(device: str, local_rank: int) -> torch.device:
    """The device of one of several processes on a machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.startswith("cuda:") and here > 1:
        raise UsageError(
            f"--device {device} is one GPU, but {here} processes run on this machine",
            fix="--device cuda; CUDA_VISIBLE_DEVICES chooses among GPUs",
        )
    gpus = torch.cuda.device_count()
    wants_gpus = device == "cuda" or (device == "auto" and (gpus or "OGREG_LAUNCHED" in os.environ))
    if not wants_gpus:
        return pick_device("cpu" if device == "auto" else device)
    if gpus < here:
        raise EnvironmentFault(
            f"{here} processes need as many GPUs; this machine has {gpus}",
            fix=f"--gpus {gpus}" if gpus > 1 else "--device cpu runs the processes on the CPU",
        )
    return pick_device(f"cuda:{local_rank}")


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _not_joined(what: str, error: BaseException) -> EnvironmentFault:
    return EnvironmentFault(
        what,
        where=_address(),
        why=(str(error).splitlines() or [type(error).__name__])[0],
        fix="check that every machine was started with the same address, port and number of processes",
    )


def _connect(is_host: bool) -> dist.TCPStore:
    """The store of the job: torchrun's, or one of the main process."""
    try:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_host,
            timeout=_ARRIVAL,
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        what = (
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others"
        )
        raise _not_joined(what, error) from error


def _meet(store: dist.Store, rank: int, size: int) -> str:
    """Agree with the other processes on a name for this meeting, once all of them are here.

    torchrun keeps its store when it starts the job anew, with everything that the dead wrote into
    it, and its machines count restarts differently. So the main process offers a name that never
    was; each other one answers with a number that never was, and goes on when the main process has
    seen that very number.

    Raises:
        EnvironmentFault: not all came; on the main process, names them.
    """
    until = time.monotonic() + _ARRIVAL.total_seconds()
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("ogreg/offer", own)
        numbers = [own]
        for other in range(1, size):
            if not _comes(store, f"ogreg/{own}/{other}", until):
                missing = [r for r in range(1, size) if not store.check([f"ogreg/{own}/{r}"])]
                raise EnvironmentFault(
                    f"process {', '.join(map(str, missing))} of {size} never arrived",
                    where=f"{_address()}, on {socket.gethostname()}",
                    why=f"waited for {_ARRIVAL.total_seconds():.0f} s",
                    fix="look for an error of theirs above, or in the output of their machines",
                )
            numbers.append(store.get(f"ogreg/{own}/{other}").decode())
        store.set(f"ogreg/{own}/all", json.dumps(numbers))
        return own
    while time.monotonic() < until:
        if _comes(store, "ogreg/offer", until):
            offer = store.get("ogreg/offer").decode()
            store.set(f"ogreg/{offer}/{rank}", own)
            if _comes(store, f"ogreg/{offer}/all", time.monotonic() + 20 * _ASK_SECONDS):
                if json.loads(store.get(f"ogreg/{offer}/all"))[rank] == own:
                    return offer
                time.sleep(_ASK_SECONDS)
    raise EnvironmentFault(
        f"process {rank} of {size} waited for the others in vain",
        where=_address(),
        why=f"after {_ARRIVAL.total_seconds():.0f} s",
        fix="look for an error of theirs above, or in the output of their machines",
    )


def _comes(store: dist.Store, key: str, until: float) -> bool:
    """Whether a key is set before a moment."""
    while not store.check([key]):
        if time.monotonic() >= until:
            return False
        time.sleep(_ASK_SECONDS)
    return True
