from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

from ogreg_core import distributed
from ogreg_core.distributed import SINGLE, join
from ogreg_core.errors import DataError, EnvironmentFault, UsageError
from tests import ranks


def exchanges():
    with join("cpu") as (world, device):
        assert device.type == "cpu"
        world.barrier()
        return (
            world.rank,
            world.is_main,
            world.sum([world.rank + 1.0, 0.5]),
            world.gather({"rank": world.rank}),
            world.broadcast(f"from {world.rank}"),
        )


def test_what_processes_tell_each_other():
    everything = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert ranks.run(3, exchanges) == [
        (rank, rank == 0, [6.0, 1.5], everything, "from 0") for rank in range(3)
    ]


def late(missing, patience):
    distributed._ARRIVAL = timedelta(seconds=patience)
    if int(os.environ["RANK"]) == missing:
        return None
    try:
        with join("cpu"):
            return "joined"
    except EnvironmentFault as error:
        return error.what


def test_who_never_arrives_is_named():
    found = ranks.run(3, late, 1, 3.0)
    assert found[:2] == ["process 1 of 3 never arrived", None]
    # The main process may have left, and with it the store.
    assert found[2] is not None
    assert found[2] != "joined"


def refuse():
    raise DataError("nothing there", fix="look elsewhere")


def on_main():
    with join("cpu") as (world, _):
        value = world.on_main(lambda: f"made by {world.rank}")
        with pytest.raises(DataError, match="nothing there") as caught:
            world.on_main(refuse)
        return value, caught.value.fix


def test_work_of_the_main_process_and_its_errors_reach_all():
    assert ranks.run(2, on_main) == [("made by 0", "look elsewhere")] * 2
    assert SINGLE.on_main(lambda: 3) == 3


def meet_again(port, delay):
    """A round of a job whose store keeps what earlier rounds wrote into it."""
    time.sleep(delay)
    os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    with join("cpu") as (world, _):
        before = world.on_main(lambda: world.recall("run"))
        if world.is_main:
            world.remember("run", f"{before or ''}x")
        world.barrier()
        return before, world.sum([1.0])


def test_a_job_that_is_started_anew_meets_and_remembers():
    """Also when machines count restarts differently, as torchrun's do: nothing here counts."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for before in (None, "x", "xx"):
        found = ranks.run(2, meet_again, store.port, 0.0)
        assert found == [(before, [2.0])] * 2


def test_alone_every_exchange_is_the_identity(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join("cpu") as (world, device):
        assert world is SINGLE
        assert device == torch.device("cpu")
    assert SINGLE.sum([1.5, 2.0]) == [1.5, 2.0]
    assert SINGLE.gather("x") == ["x"]
    assert SINGLE.broadcast("x") == "x"
    SINGLE.remember("run", "x")
    assert SINGLE.recall("run") is None
    SINGLE.barrier()


def test_a_job_that_nobody_leads_is_said_to_be_so(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(EnvironmentFault, match="process 0 of 2 could not join"), join("cpu"):
        pass


def test_processes_do_not_share_a_gpu(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="cuda:0 is one GPU"), join("cuda:0"):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(EnvironmentFault, match="2 processes need as many GPUs"), join("cuda"):
        pass
