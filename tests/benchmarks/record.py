"""What every benchmark shares: its options, a description of the machine, and one line per run in a file.

A benchmark measures whatever it compares in one run, in turn, and reports medians and their ratios: only
those may be compared with another machine's. The file is JSON Lines: each run appends one document by one
write, so that it stays valid whatever happens and two benchmarks at once do not lose each other's lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "Seconds",
    "append",
    "build_parser",
    "finish",
    "machine",
    "process_medians",
    "say",
    "table",
]

SCHEMA = "ogreg.benchmark.v1"
_ROOT = Path(__file__).parents[2]


def build_parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Options of all benchmarks: how often everything is timed, and where the record goes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=repeats, help="rounds; default: %(default)s")
    parser.add_argument(
        "--append",
        type=Path,
        default=Path("benchmarks.jsonl"),
        metavar="FILE",
        help="JSON Lines file that the record is appended to; default: %(default)s",
    )
    return parser


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What the figures depend on; no names of machines or people."""
    affinity = getattr(os, "sched_getaffinity", None)
    about = {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device is not None and device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return about


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit that was measured, with a plus sign if files were changed since; unknown outside of a
    repository.
    """
    try:
        return _git("rev-parse", "--short", "HEAD") + (
            "+" if _git("diff", "HEAD", "--stat") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


class Seconds(NamedTuple):
    """Of a process: wall time, and processor time of all its threads, which other work disturbs least."""

    wall: float
    processor: float


def process_medians(
    commands: Mapping[str, Sequence[str]], repeats: int, self_timed: Collection[str] = ()
) -> dict[str, Seconds]:
    """Median times of processes that are started in turn; a first round warms the file cache.

    Args:
        commands: by name, the words of each.
        repeats: rounds.
        self_timed: those that print their wall and processor seconds.

    Raises:
        subprocess.CalledProcessError: one failed.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, words in commands.items():
            started, used = time.perf_counter(), _children_seconds()
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            whole = Seconds(time.perf_counter() - started, _children_seconds() - used)
            if number:
                own = name in self_timed
                taken[name].append(Seconds(*map(float, done.stdout.split())) if own else whole)
    return {
        name: Seconds(*map(statistics.median, zip(*seconds, strict=True)))
        for name, seconds in taken.items()
    }


def _children_seconds() -> float:
    """Processor seconds of all processes that were started and have ended."""
    times = os.times()
    return times.children_user + times.children_system


def append(path: Path, document: Mapping[str, Any]) -> None:
    """Append one document as one line, by one write."""
    line = (json.dumps(document, ensure_ascii=False) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        written = os.write(handle, line)
    finally:
        os.close(handle)
    if written != len(line):
        raise OSError(f"{path}: {written} of {len(line)} bytes written")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows side by side; columns are their keys, in order of appearance, empty where one is missing."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(columns))]
    right = [isinstance(next((r[c] for r in rows if c in r), ""), (int, float)) for c in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finish(
    benchmark: str,
    options: argparse.Namespace,
    results: Sequence[Mapping[str, Any]],
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Print the results and append the record of the run.

    Args:
        benchmark: its name.
        options: from :func:`build_parser`.
        results: rows with the units in their keys.
        device: that was measured, if not the CPU.

    Returns:
        The record.
    """
    given = {key: value for key, value in vars(options).items() if key != "append"}
    record = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "machine": machine(device),
        "options": json.loads(json.dumps(given, default=str)),
        "results": list(results),
    }
    about = record["machine"]
    where = about.get("gpu") or f"{about['cpu']}, {about['cores']} cores"
    say(
        f"{benchmark}: {where}, {about['threads']} threads, torch {about['torch']}, {about['commit']}"
    )
    say(table(results))
    append(options.append, record)
    return record


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
