"""Runs ``ogreg`` in forks of a process that has torch loaded, which a fresh interpreter takes four seconds
of processor time for: a script that answers requests on a socket with exit codes.

Nothing of ours is loaded beforehand, and a fork ends as ``python -m ogreg_cli`` does. What an interpreter
does at its start, and which imports a command avoids, is tested where it matters by fresh ones
(``tests/cli/test_start_up.py``, ``tests/e2e``).
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType

SECONDS = 280


class Forks:
    """The server, as seen by tests."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        self._stream = self._connection.makefile("rw")
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stream.close()
        self._connection.close()
        self._server.wait()

    def run(
        self, folder: Path, arguments: list[str], given: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run`` of ``ogreg`` with these arguments in this folder, where its home is too, and
        with more in the environment.
        """
        streams = [
            folder.parent / f"{folder.name}-{name}" for name in ("stdin", "stdout", "stderr")
        ]
        streams[0].write_text(given)
        whole = {**os.environ, "OGREG_HOME": str(folder / "home"), **environment}
        request = (arguments, str(folder), list(map(str, streams)), whole)
        self._stream.write(json.dumps(request) + "\n")
        self._stream.flush()
        code = int(self._stream.readline())
        out, error = (path.read_text() for path in streams[1:])
        return subprocess.CompletedProcess(["ogreg", *arguments], code, out, error)


def become(
    arguments: list[str], folder: str, streams: list[str], environment: dict[str, str]
) -> None:
    """What a shell does before it executes a command."""
    signal.alarm(SECONDS)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[0] = folder
    sys.argv = ["ogreg", *arguments]
    for number, path in enumerate(streams):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(path, flags), number)


def serve(connection: socket.socket) -> None:
    connection.set_inheritable(False)
    stream = connection.makefile("rw")
    for line in stream:
        child = os.fork()
        if child == 0:
            connection.close()
            become(*json.loads(line))
            runpy.run_module("ogreg_cli", run_name="__main__", alter_sys=True)
            return
        stream.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        stream.flush()


if __name__ == "__main__":
    import torch  # noqa: F401
    import torchvision.transforms.v2  # noqa: F401

    serve(socket.socket(fileno=int(sys.argv[1])))
