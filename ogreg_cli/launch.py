"""Starting a command again in several processes, by PyTorch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from ogreg_cli.console import info
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

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            # What failed is said by the process that it happened to.
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # torch passes on what it knows; SIGUSR1, which schedulers send, it does not.
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    # Finishing a step and saving a large state takes longer than torch's 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
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
        # gloo aborts where another process leaves; that process knows why.
        rank, first = min(
            error.failures.items(),
            key=lambda item: (item[1].exitcode == -signal.SIGABRT, item[1].timestamp),
        )
        if first.exitcode >= 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name
        hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
        info(f"error: process {rank} was ended by {name}{hint}")
        return _SIGNALLED - first.exitcode
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 143
    return 0
