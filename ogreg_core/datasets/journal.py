"""What is already known about each file, so that work that was killed goes on where it stopped.

Plain JSON lines, appended as results come in. A record counts as long as its file has the same size
and modification time; a line that a kill cut short is dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ogreg_core.errors import DataError, EnvironmentFault
from ogreg_core.files import lock_file, remove_leftovers, write_atomic, write_text_atomic

__all__ = ["Journal", "Shard", "claim", "fingerprint", "owner"]

Record = dict[str, Any]
Shard = tuple[int, int]  # number, counted from 1, and of how many

_FOLDER = ".ogreg"
_OWNER = "dataset"
_COMPLETE = "complete"
# Records of checks that looked at other things are of no use; raise this when the checks change.
_VERSION = 1


def owner(folder: Path) -> str | None:
    """The data set that ``prepare`` has worked on in this folder before; None if there is none."""
    try:
        return (folder / _FOLDER / _OWNER).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def claim(folder: Path, dataset: str) -> None:
    """Note that the folder is this data set's."""
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder / _FOLDER / _OWNER)
    if owner(folder) != dataset:
        write_text_atomic(folder / _FOLDER / _OWNER, dataset)


class Journal:
    """The records of one kind of work on one data set.

    Args:
        folder: where the manifest lies; the journal goes into a hidden folder there.
        work: names the kind of work; letters, digits and dashes.
        shard: this process's share; None if there is only one.

    Use as a context manager while adding; only one process at a time may.
    """

    def __init__(self, folder: Path, work: str, shard: Shard | None = None) -> None:
        self._folder = folder / _FOLDER
        self._work = f"v{_VERSION}-{work}"
        self.shard = shard
        self._file: IO[bytes] | None = None
        self._lock: IO[str] | None = None
        # Lines as they stand in the file: a parsed record takes four times the memory.
        self._lines: dict[str, bytes] = {}
        self._finished: dict[Shard, str] = {}
        # A shard needs its own records and those of an earlier run without shards.
        files = [self._path(shard)] if shard else list(self.shard_files().values())
        for path in [self._path(None), *files]:
            self._load(path)

    def _path(self, shard: Shard | None, ending: str = "jsonl") -> Path:
        suffix = "" if shard is None else f".{shard[0]}-of-{shard[1]}"
        return self._folder / f"{self._work}{suffix}.{ending}"

    def shard_files(self) -> dict[Shard, Path]:
        """The journals of shards that were begun."""
        pattern = re.compile(rf"{re.escape(self._work)}\.(\d+)-of-(\d+)\.jsonl")
        if not self._folder.is_dir():
            return {}
        found = ((path, pattern.fullmatch(path.name)) for path in sorted(self._folder.iterdir()))
        return {(int(m[1]), int(m[2])): path for path, m in found if m}

    def _load(self, path: Path) -> None:
        if not path.is_file():
            return
        with open(path, "rb") as file:
            for line in file:
                # A kill or a full disk may have ended a line anywhere, also within a character.
                try:
                    record = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError):
                    continue
                if not line.endswith(b"\n"):
                    break
                if _COMPLETE in record:
                    number, count = record["shard"]
                    self._finished[number, count] = record[_COMPLETE]
                elif "path" in record:
                    self._lines[record["path"]] = line

    def __getitem__(self, path: str) -> Record:
        record: Record = json.loads(self._lines[path])
        return record

    def get(self, path: str) -> Record | None:
        """The record of a file, changed since or not."""
        line = self._lines.get(path)
        return json.loads(line) if line else None

    def __contains__(self, path: str) -> bool:
        return path in self._lines

    def known(self, path: str, size: int, modified_ns: int) -> Record | None:
        """The record of a file that has not changed since."""
        record = self.get(path)
        if record and record["size"] == size and record["modified_ns"] == modified_ns:
            return record
        return None

    def __enter__(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self._path(self.shard, "lock"))
        path = self._path(self.shard)
        remove_leftovers(path)
        _drop_broken_tail(path)
        self._file = open(path, "ab")
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._lock):
            if file is not None:
                file.close()
        self._file = self._lock = None

    def add(self, record: Record) -> None:
        """Keep a record: ``path``, ``size``, ``modified_ns`` and what was found out."""
        self._lines[record["path"]] = self._append(record)

    def adopt(self, record: Record) -> None:
        """Take over a record of other work; it is written when this journal is compacted."""
        self._lines[record["path"]] = _line(record)

    def _append(self, record: Record) -> bytes:
        assert self._file is not None
        line = _line(record)
        self._file.write(line)
        # To the operating system at once: a killed process loses nothing.
        self._file.flush()
        return line

    def finish_shard(self, listing: Iterable[str]) -> None:
        """Note that this shard has seen its whole share of ``listing``."""
        assert self.shard is not None
        self._append({_COMPLETE: fingerprint(listing), "shard": list(self.shard)})

    def check_shards(self, listing: Iterable[str], command: str) -> None:
        """Refuse to merge before all shards are complete and of the same listing.

        Args:
            listing: all files of the data set, in order.
            command: the command line of a shard without its ``--shard``.

        Raises:
            DataError: names the shards that are missing.
        """
        files = self.shard_files()
        counts = {count for _, count in files}
        if len(counts) > 1:
            raise DataError(
                f"shards of different splits lie in {self._folder}",
                why=", ".join(path.name for path in files.values()),
                fix="remove those that do not belong together",
            )
        count = counts.pop()
        expected = fingerprint(listing)
        problems = []
        for number in range(1, count + 1):
            state = self._finished.get((number, count))
            if state is None:
                problems.append(f"{command} --shard {number}/{count}")
            elif state != expected:
                problems.append(
                    f"{command} --shard {number}/{count}   # files or annotations changed since"
                )
        if problems:
            raise DataError(
                f"{len(problems)} of {count} shards are not complete",
                where=str(self._folder),
                fix="\n".join(problems),
            )

    def compact(self, paths: Iterable[str]) -> None:
        """Rewrite the journal with the records of ``paths`` in their order, and drop shard files."""

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                file.writelines(self._lines[path] for path in paths if path in self)

        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(None), write)
        for shard in self.shard_files():
            self._path(shard).unlink(missing_ok=True)
            self._path(shard, "lock").unlink(missing_ok=True)


def _line(record: Record) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _take_lock(path: Path) -> IO[str]:
    """Hold a file that no other process can hold, until it is closed or this process ends.

    Raises:
        EnvironmentFault: another process holds it.
    """
    try:
        return lock_file(path)
    except BlockingIOError as error:
        raise EnvironmentFault(
            "another `ogreg prepare` is at work here",
            where=str(path.parent.parent),
            fix="wait for it, or give each process its own --shard",
        ) from error


def fingerprint(listing: Iterable[str]) -> str:
    """A hash of a list of paths."""
    digest = hashlib.sha256()
    for path in listing:
        digest.update(os.fsencode(path) + b"\0")
    return digest.hexdigest()


def _drop_broken_tail(path: Path) -> None:
    """Cut off a last line that a kill left without its end."""
    if path.is_file():
        with open(path, "rb+") as file:
            file.truncate(sum(_whole(file)))


def _whole(file: IO[bytes]) -> Iterator[int]:
    for line in file:
        if line.endswith(b"\n"):
            yield len(line)
