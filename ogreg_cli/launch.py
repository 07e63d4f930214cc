"""Starting a command again in several processes, by PyTorch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from ogreg_core.errors import UsageError
from ogreg_core.launching import is_launched

__all__ = ["launch", "wants_launch"]

_SIGNALLED = 128


def wants_launch(gpus: int | None) -> bool:
    """Whether ``--gpus`` asks this process to start others that do the work.

    Raises:
        UsageError: a launcher has started this process already.
    """
    if gpus is None:
        return False
    # The processes that launch() starts see the option too; what torchrun starts must not.
    if is_launched() and "OGREG_LAUNCHED" not in os.environ:
        raise UsageError(
            "--gpus and torchrun exclude each other: both say how many processes there are",
            fix="leave --gpus out",
        )
    return not is_launched() and gpus > 1


def launch(processes: int) -> int:
    """Run this command line in ``processes`` processes on this machine and return the exit code.

    They find each other through the environment (RANK, WORLD_SIZE ...) as under ``torchrun``; the
    one of rank 0 speaks. A signal is passed on to all of them.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What failed is said by the process that it happened to.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ["OGREG_LAUNCHED"] = "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "ogreg_cli", *sys.argv[1:])
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return _SIGNALLED - first.exitcode if first.exitcode < 0 else first.exitcode
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 143
    return 0
