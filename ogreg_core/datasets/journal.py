"""What is already known about each file, so that work that was killed goes on where it stopped.

Plain JSON lines, appended as results come in. A record counts as long as its file has the same size
and modification time; a line that a kill cut short is dropped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from ogreg_core.errors import DataError
from ogreg_core.files import write_text_atomic

__all__ = ["Journal", "Shard", "fingerprint", "has_journal"]

Record = dict[str, Any]
Shard = tuple[int, int]  # number, counted from 1, and of how many

_FOLDER = ".ogreg"
_COMPLETE = "complete"


def has_journal(folder: Path) -> bool:
    """Whether ``prepare`` has worked in this folder before."""
    return (folder / _FOLDER).is_dir()


class Journal:
    """The records of one kind of work on one data set.

    Args:
        folder: where the manifest lies; the journal goes into a hidden folder there.
        work: names the kind of work; letters, digits and dashes.
        shard: this process's share; None if there is only one.

    Use as a context manager while adding.
    """

    def __init__(self, folder: Path, work: str, shard: Shard | None = None) -> None:
        self._folder = folder / _FOLDER
        self._work = work
        self.shard = shard
        self._file: TextIO | None = None
        self.records: dict[str, Record] = {}
        self._finished: dict[Shard, str] = {}
        for path in [self._path(None), *self._shard_files().values()]:
            self._load(path)

    def _path(self, shard: Shard | None) -> Path:
        suffix = "" if shard is None else f".{shard[0]}-of-{shard[1]}"
        return self._folder / f"{self._work}{suffix}.jsonl"

    def _shard_files(self) -> dict[Shard, Path]:
        pattern = re.compile(rf"{re.escape(self._work)}\.(\d+)-of-(\d+)\.jsonl")
        if not self._folder.is_dir():
            return {}
        found = ((path, pattern.fullmatch(path.name)) for path in sorted(self._folder.iterdir()))
        return {(int(m[1]), int(m[2])): path for path, m in found if m}

    def _load(self, path: Path) -> None:
        if not path.is_file():
            return
        with open(path, encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    break  # cut short by a kill
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the disk was full in the middle of a line
                if _COMPLETE in record:
                    self._finished[tuple(record["shard"])] = record[_COMPLETE]
                elif "path" in record:
                    self.records[record["path"]] = record

    def known(self, path: str, size: int, modified_ns: int) -> Record | None:
        """The record of a file that has not changed since."""
        record = self.records.get(path)
        if record and record["size"] == size and record["modified_ns"] == modified_ns:
            return record
        return None

    def __enter__(self) -> Journal:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.shard)
        _drop_broken_tail(path)
        self._file = open(path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, record: Record) -> None:
        """Keep a record: ``path``, ``size``, ``modified_ns`` and what was found out."""
        self.records[record["path"]] = record
        self._append(record)

    def _append(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        # To the operating system at once: a killed process loses nothing.
        self._file.flush()

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
        files = self._shard_files()
        counts = {count for _, count in files}
        if not files:
            raise DataError(
                "there are no shards to merge",
                where=str(self._folder),
                fix=f"{command} --shard 1/2",
            )
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
        records = (self.records[path] for path in paths if path in self.records)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self._path(None), text)
        for path in self._shard_files().values():
            path.unlink()


def fingerprint(listing: Iterable[str]) -> str:
    """A hash of a list of paths."""
    digest = hashlib.sha256()
    for path in listing:
        digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _drop_broken_tail(path: Path) -> None:
    """Cut off a last line that a kill left without its end."""
    if not path.is_file():
        return
    with open(path, "rb+") as file:
        content_end = 0
        for line in file:
            if line.endswith(b"\n"):
                content_end += len(line)
        file.truncate(content_end)
