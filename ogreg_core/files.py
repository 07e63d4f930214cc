"""Small file operations that leave nothing half-written, and which files look like videos or images."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "lock_file",
    "remove_leftovers",
    "write_atomic",
    "write_text_atomic",
]

_FULL_DISK_BYTES = 2**20

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv"}
    | {".ts", ".webm", ".wmv"}
)
# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = frozenset(
    {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk, then rename it over
    ``path``.

    A kill or a full disk at any moment leaves either the old file or the new one, never a part.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            write(temporary)
        except Exception as error:
            # torch and safetensors report a full disk in words of their own.
            if shutil.disk_usage(path.parent).free < _FULL_DISK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give the result the permissions a plain open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def lock_file(path: Path) -> IO[str]:
    """Hold a file that no other process can hold, until it is closed or this process ends.

    Windows and some network file systems have no such locks; there the user has to see to it.

    Raises:
        BlockingIOError: another process holds it.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except OSError:
            return file
        # A forked child shares the lock: a worker would hold it for seconds after its parent died.
        os.register_at_fork(after_in_child=file.close)
    return file


def remove_leftovers(path: Path) -> None:
    """Remove what a kill in the middle of :func:`write_atomic` left beside ``path``."""
    for file in path.parent.iterdir():
        if file.name.startswith(f".{path.name}.") and file.name.endswith(".tmp"):
            file.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; of a file's name that is no UTF-8 the odd bytes are escaped."""
    write_atomic(path, lambda temporary: temporary.write_text(printable(text), encoding="utf-8"))


def printable(text: str) -> str:
    """Text without the surrogates that stand for odd bytes in names of files: they are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
