from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch

from ogreg_core import distributed
from ogreg_core.distributed import SINGLE, join
from ogreg_core.errors import EnvironmentFault
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
    # The main process may have left, and with it the list of those who came.
    assert found[2] in (found[0], "process 2 of 3 could not join the others")


def test_alone_every_exchange_is_the_identity(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join("cpu") as (world, device):
        assert world is SINGLE
        assert device == torch.device("cpu")
    assert SINGLE.sum([1.5, 2.0]) == [1.5, 2.0]
    assert SINGLE.gather("x") == ["x"]
    assert SINGLE.broadcast("x") == "x"
    SINGLE.barrier()


def test_a_job_that_nobody_leads_is_said_to_be_so(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(EnvironmentFault, match="process 0 of 2 could not join"), join("cpu"):
        pass
