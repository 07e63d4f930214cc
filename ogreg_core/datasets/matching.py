"""Rows of annotations matched with files: what the readers of official annotations share."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ogreg_core.datasets.listing import (
    Entry,
    LeftOut,
    Listing,
    nothing_matched,
    read_annotation,
)
from ogreg_core.errors import DataError, UsageError

__all__ = ["Annotated", "Matched", "by_stem", "match_rows", "name_of_fold", "read_json"]


@dataclass(frozen=True, slots=True)
class Annotated:
    """One row of the annotations: what they call the video, its class index, its split."""

    name: str
    label: int
    split: str


@dataclass(frozen=True)
class Matched:
    """Annotated rows matched with files; the fields are those of :class:`Listing`."""

    entries: list[Entry]
    annotated: dict[str, int]
    left_out: list[LeftOut]
    extra: list[str]
    notes: list[str]

    def listing(
        self,
        dataset: str,
        root: Path,
        labels: list[str],
        *,
        mirror: dict[str, str] | None = None,
        notes: Sequence[str] = (),
        options: dict[str, Any],
    ) -> Listing:
        """The data set that the rows make up; ``notes`` come before those of the matching."""
        return Listing(
            dataset=dataset,
            root=root,
            labels=labels,
            entries=self.entries,
            annotated=self.annotated,
            left_out=self.left_out,
            extra=self.extra,
            mirror=mirror or {},
            notes=[*notes, *self.notes],
            options=options,
        )


def name_of_fold(title: str, fold: int) -> str:
    """The name to remember one of a data set's three official splits by.

    Raises:
        UsageError: no such fold.
    """
    if fold not in (1, 2, 3):
        raise UsageError(f"{title} has no fold {fold}", fix="fold 1, 2 or 3")
    return title.lower() if fold == 1 else f"{title.lower()}-{fold}"


def match_rows(
    root: Path,
    rows: Iterable[Annotated],
    files: Sequence[str],
    candidates: Callable[[Annotated], Sequence[str]],
) -> Matched:
    """Give each annotated row its file, and account for every row and every file that has none.

    Args:
        root: folder that the files are relative to.
        rows: in the order of the annotations.
        files: all videos below ``root``.
        candidates: the files of a row, the preferred one first; the others are listed as
            duplicates unless they are links to a file that is used.

    Raises:
        DataError: no row has a file.
    """
    entries: list[Entry] = []
    left_out: list[LeftOut] = []
    annotated: Counter[str] = Counter()
    names: defaultdict[str, set[str]] = defaultdict(set)
    taken: defaultdict[str, set[str]] = defaultdict(set)
    spare: dict[str, Entry] = {}
    for row in rows:
        annotated[row.split] += 1
        if row.name in names[row.split]:
            detail = f"annotated more than once in {row.split}; the first row is used"
            left_out.append(LeftOut(row.name, "duplicate", detail, row.split))
            continue
        names[row.split].add(row.name)
        found = candidates(row)
        if not found:
            detail = "annotated, but there is no such file"
            left_out.append(LeftOut(row.name, "missing", detail, row.split))
            continue
        if found[0] in taken[row.split]:
            detail = f"{found[0]} already stands for another row of {row.split}"
            left_out.append(LeftOut(row.name, "duplicate", detail, row.split))
            continue
        taken[row.split].add(found[0])
        entries.append(Entry(found[0], row.label, row.split))
        for other in found[1:]:
            spare.setdefault(other, entries[-1])
    if not entries:
        raise nothing_matched(root, [item.path for item in left_out], files)
    used = set().union(*taken.values())
    left_out += _other_files(root, used, spare)
    extra = [path for path in files if path not in used and path not in spare]
    return Matched(entries, dict(annotated), left_out, extra, _overlap(names))


def _other_files(root: Path, used: set[str], spare: dict[str, Entry]) -> list[LeftOut]:
    """Further files of annotated videos, without links to a file that is used or already listed."""
    seen = {os.path.realpath(root / entry.path) for entry in spare.values()}
    others = []
    for path, entry in sorted(spare.items()):
        real = os.path.realpath(root / path)
        if path in used or real in seen:
            continue
        seen.add(real)
        detail = f"another file of the same annotated video; {entry.path} is used"
        others.append(LeftOut(path, "duplicate", detail, entry.split))
    return others


def _overlap(names: dict[str, set[str]]) -> list[str]:
    """A note on videos that are in more than one split."""
    counts = Counter(name for split in names.values() for name in split)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if not twice:
        return []
    return [f"{len(twice):,} clips are annotated in two splits, for example {twice[0]}"]


def by_stem(files: Iterable[str]) -> dict[str, list[str]]:
    """Files by their name without folder and extension."""
    stems: dict[str, list[str]] = {}
    for path in files:
        stems.setdefault(os.path.splitext(path.rpartition("/")[2])[0], []).append(path)
    return stems


def read_json(path: Path, kind: type) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: unreadable, no JSON, or the outermost value is not a ``kind``.
    """
    try:
        content = json.loads(read_annotation(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON", why=str(error), fix="fetch it again"
        ) from error
    if not isinstance(content, kind):
        raise DataError(
            f"{path} is not the file it is named after",
            why=f"expected a JSON {kind.__name__}, found a {type(content).__name__}",
        )
    return content
