"""Run folders ``runs/<command>/<name>/<n>``: created race-free, never overwritten, understandable by
themselves.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ogreg_core import __version__
from ogreg_core.errors import CheckpointError, EnvironmentFault, UsageError
from ogreg_core.files import lock_file, write_text_atomic

# Other processes of a job write no log; without this Python would print their warnings.
logging.getLogger("ogreg").addHandler(logging.NullHandler())

__all__ = ["RunFolder", "environment", "find_checkpoint"]


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Contents: ``recipe.toml`` (resolved, usable as input), ``command.txt``, ``env.json``,
        ``data.json``, ``run.log``,
    ``metrics.jsonl``, ``status.json``, ``checkpoints/``, ``tensorboard/``, ``eval/``.
    """

    path: Path

    @classmethod
    def create(
        cls, command: str, name: str, out: Path | None = None, base: Path = Path("runs")
    ) -> RunFolder:
        """Make a new run folder.

        Args:
            command, name: parts of the default place ``runs/<command>/<name>/<n>``.
            out: explicit folder instead; must be empty or missing.
            base: instead of ``runs``.

        Raises:
            UsageError: ``out`` holds something already.
            EnvironmentFault: the folder cannot be made.
        """
        try:
            if out is not None:
                cls.check_free(out)
                out.mkdir(parents=True, exist_ok=True)
                return cls(out)
            parent = base / command / name
            parent.mkdir(parents=True, exist_ok=True)
            number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
            while True:
                try:
                    # mkdir is the lock: of two runs that start together, one gets the next number.
                    (parent / str(number)).mkdir()
                    return cls(parent / str(number))
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise EnvironmentFault(
                "the run folder cannot be created", why=str(error), fix="--out FOLDER"
            ) from error

    @staticmethod
    def check_free(out: Path | None) -> None:
        """Refuse an explicit folder that holds something, before any work is done.

        Raises:
            UsageError: it is not empty, or a file.
        """
        if out is None or not out.exists():
            return
        if not out.is_dir() or (any(out.iterdir()) and not RunFolder(out).is_stillborn):
            raise UsageError(
                f"{out} is not an empty folder",
                fix=f"choose another --out, or --resume {shlex.quote(str(out))} if it is a training",
            )

    @property
    def is_stillborn(self) -> bool:
        """Whether a training was begun here that died before it had anything to continue."""
        begun = {"recipe.toml", "env.json", "data.json", "run.log", "status.json", "command.txt"}
        begun |= {"checkpoints", "init.json", "lock"}
        if not (self.path / "recipe.toml").is_file() or self.state.exists():
            return False
        return {file.name for file in self.path.iterdir()} <= begun

    def own(self) -> IO[str]:
        """Claim the folder for this process until the returned file is closed, or the process ends.

        Raises:
            UsageError: another process has it.
        """
        path = self.path / "lock"
        try:
            file = lock_file(path)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is training in {self.path}",
                why=path.read_text(encoding="utf-8").strip(),
                fix="wait for it, or stop it",
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        return file

    @property
    def checkpoints(self) -> Path:
        """Folder of ``best.safetensors``, ``last.safetensors`` and ``state.pt``."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The checkpoint with the best validation top-1."""
        return self.checkpoints / "best.safetensors"

    @property
    def last(self) -> Path:
        """The checkpoint of the last finished epoch."""
        return self.checkpoints / "last.safetensors"

    @property
    def state(self) -> Path:
        """Everything that ``--resume`` needs."""
        return self.checkpoints / "state.pt"

    def note_command(self) -> None:
        """Append the command line to ``command.txt``: first the start, then each resumption."""
        with open(self.path / "command.txt", "a", encoding="utf-8") as file:
            file.write(shlex.join(sys.argv) + "\n")

    def write_json(self, name: str, content: Any) -> None:
        """Write one JSON document atomically."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, name: str) -> Any:
        """Read one of the run's JSON documents.

        Raises:
            CheckpointError: missing or broken.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read", why=str(error)) from error

    def status(self, state: str, code: int, reason: str = "", resume: str = "") -> None:
        """Write ``status.json``; launchers swallow exit codes, this file does not."""
        self.write_json(
            "status.json", {"state": state, "code": code, "reason": reason, "resume": resume}
        )

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``, flushed at once."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def drop_metrics_after(self, step: int, epoch: int) -> None:
        """Forget steps later than ``step`` and validations later than ``epoch``: a resumed run
        writes them again.
        """
        path = self.path / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, step, epoch)]
            write_text_atomic(path, "".join(f"{line}\n" for line in kept))

    def open_log(self) -> logging.Handler:
        """Send the ``ogreg`` loggers to ``run.log`` from DEBUG up; returns the handler, to be
        closed.
        """
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger = logging.getLogger("ogreg")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(handler)
        return handler


def _is_before(line: str, step: int, epoch: int) -> bool:
    try:
        record = json.loads(line)
        return bool(
            record["step"] <= step and (record["kind"] != "val" or record["epoch"] <= epoch)
        )
    except (json.JSONDecodeError, KeyError, TypeError):
        # A line cut in half by a kill.
        return False


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file meant by a file or a run folder (its best one).

    Raises:
        CheckpointError: nothing there.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    run = RunFolder(path)
    for candidate in (run.best, run.last):
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"{path} holds no checkpoint", why=f"neither {run.best} nor {run.last} exists"
    )


def environment() -> dict[str, Any]:
    """Versions and machine, for ``env.json`` and bug reports."""
    packages = ("torch", "torchvision", "decord", "av", "numpy", "safetensors", "fvcore", "einops")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "ogreg": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": versions,
    }
