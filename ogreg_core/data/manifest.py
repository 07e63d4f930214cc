"""The manifest: one CSV per split, ``labels.txt`` and ``dataset.json`` in one folder.

Plain files that a person can open and edit; every command finds its videos through them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogreg_core.errors import DataError
from ogreg_core.files import write_text_atomic

if TYPE_CHECKING:
    from ogreg_core.video import VideoInfo

__all__ = [
    "DATASET_FILE",
    "LABELS_FILE",
    "SPLITS",
    "UNLABELLED",
    "Manifest",
    "Row",
    "is_manifest",
    "load_manifest",
    "read_dataset_info",
    "write_dataset",
]

DATASET_FILE = "dataset.json"
LABELS_FILE = "labels.txt"
SPLITS = ("train", "val", "test")
# The label of test videos whose class is withheld.
UNLABELLED = -1


@dataclass(frozen=True, slots=True)
class Row:
    """One video of a manifest.

    Args:
        path: relative to the video root; absolute only where the data set's options allow it.
        label: class index, 0-based; ``UNLABELLED`` if withheld.
        frames: presented frames.
        fps: mean frames per second.
        duration: seconds.
        width, height: pixels as displayed.
        decoder: ``decord`` or ``pyav``, whichever reads the file exactly; ``image`` for an image.
        variable_rate: whether frame times are uneven, so that they must be looked up in the file.
        rotation: degrees counter-clockwise that the container asks for.
        codec: FFmpeg's name.
    """

    path: str
    label: int
    frames: int
    fps: float
    duration: float
    width: int
    height: int
    decoder: str
    variable_rate: bool = False
    rotation: int = 0
    codec: str = ""

    @classmethod
    def from_probe(cls, path: str, info: VideoInfo, label: int = 0) -> Row:
        """The row of a file that was probed; ``path`` is relative to the video root."""
        return cls(
            path=path,
            label=label,
            frames=info.frames,
            fps=info.fps,
            duration=info.duration,
            width=info.width,
            height=info.height,
            decoder=info.reader,
            variable_rate=info.variable_rate,
            rotation=info.rotation,
            codec=info.codec,
        )


@dataclass(frozen=True)
class Manifest:
    """The rows of one split with all that is needed to read them.

    Args:
        root: folder that holds the videos.
        split: ``train``, ``val`` or ``test``.
        rows: in file order.
        labels: class names by index.
        mirror: class index after a left-right flip, for classes that a flip turns into another one.
        sha256: of the labels and the split's CSV file.
        dataset: name of the data set.
        annotated: videos that the annotations list for this split, with or without a usable file; 0
            if there are no annotations.
    """

    root: Path
    split: str
    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    mirror: dict[int, int] = field(default_factory=dict)
    sha256: str = ""
    dataset: str = ""
    annotated: int = 0

    def require_labels(self) -> None:
        """Refuse a split whose classes are withheld.

        Raises:
            DataError: it cannot be learnt from or scored.
        """
        if any(row.label == UNLABELLED for row in self.rows):
            raise DataError(
                f"the {self.split} split of {self.dataset} has videos without a label",
                why="its annotations withhold the classes",
                fix="choose another split; `ogreg predict` names the actions in single files",
            )

    def video(self, row: Row) -> Path:
        """Where a row's file lies."""
        return self.root / row.path


def write_dataset(
    folder: Path,
    *,
    dataset: str,
    video_root: Path,
    labels: Iterable[str],
    splits: dict[str, list[Row]],
    mirror: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
    coverage: Mapping[str, Mapping[str, int]] | None = None,
    version: str,
) -> dict[str, Any]:
    """Write the manifest files of a data set, ``dataset.json`` last so that its presence means
    completeness.

    Args:
        folder: where the manifest goes; created if missing.
        dataset: name of the data set.
        video_root: folder that holds the videos; stored relative to ``folder`` where it lies
            inside.
        labels: class names in index order.
        splits: rows by split name.
        mirror: class names that a left-right flip turns into each other.
        options: how the data set was prepared.
        coverage: for each split how many videos were annotated, found and usable.
        version: version of the tool.

    Returns:
        The content of ``dataset.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATASET_FILE).unlink(missing_ok=True)
    for split in SPLITS:
        if split not in splits:
            (folder / f"{split}.csv").unlink(missing_ok=True)
    labels = list(labels)
    write_text_atomic(folder / LABELS_FILE, "".join(f"{label}\n" for label in labels))
    for split, rows in splits.items():
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows([_cell(getattr(row, f.name)) for f in fields(Row)] for row in rows)
        write_text_atomic(folder / f"{split}.csv", buffer.getvalue())
    info = {
        "schema": 1,
        "dataset": dataset,
        "root": os.path.relpath(video_root, folder)
        if _inside(video_root, folder)
        else str(video_root.resolve()),
        "classes": len(labels),
        "videos": {split: len(rows) for split, rows in splits.items()},
        "coverage": coverage or {},
        "mirror": mirror or {},
        "options": options or {},
        "ogreg_version": version,
    }
    write_text_atomic(folder / DATASET_FILE, json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    return info


def _cell(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def read_dataset_info(folder: Path) -> dict[str, Any]:
    """The content of ``dataset.json``.

    Raises:
        DataError: no prepared data set there, or the file is broken.
    """
    path = folder / DATASET_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no prepared data set",
            why=f"{path} does not exist",
            fix=f"ogreg prepare folder {shlex.quote(str(folder))}, or the data set's own prepare",
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not valid JSON", why=str(error), fix="run `ogreg prepare` again"
        ) from error
    missing = {"dataset", "root"} - set(info)
    if missing:
        raise DataError(
            f"{path} lacks {', '.join(sorted(missing))}", fix="run `ogreg prepare` again"
        )
    return info


def is_manifest(path: Path) -> bool:
    """Whether a CSV file is the table of a split rather than somebody's annotations."""
    with open(path, "rb") as file:
        return file.readline().lstrip(b"\xef\xbb\xbf").startswith(b"path,label,frames,")


def load_manifest(folder: Path, split: str) -> Manifest:
    """Read one split.

    Raises:
        DataError: no such data set or split, or a broken line (named with its number).
    """
    info = read_dataset_info(folder)
    path = folder / f"{split}.csv"
    if not path.is_file():
        have = ", ".join(name for name in SPLITS if (folder / f"{name}.csv").is_file()) or "none"
        raise DataError(f"{folder} has no split {split!r}", why=f"splits found: {have}")
    names = _read_text(folder / LABELS_FILE)
    # Not splitlines, which also breaks at characters that class names may hold.
    labels = tuple(name.rstrip("\r") for name in names.removesuffix("\n").split("\n"))
    content = _read_text(path)
    outside = bool(info.get("options", {}).get("allow_outside"))
    rows = tuple(_parse_rows(path, content, len(labels), outside))
    if not rows:
        raise DataError(f"{path} lists no videos")
    return Manifest(
        root=(folder / info["root"]).resolve(),
        split=split,
        rows=rows,
        labels=labels,
        mirror=_mirror_indices(folder, info.get("mirror", {}), labels),
        sha256=hashlib.sha256(f"{names}\n{content}".encode()).hexdigest(),
        dataset=info["dataset"],
        annotated=int(info.get("coverage", {}).get(split, {}).get("annotated", 0)),
    )


def _read_text(path: Path) -> str:
    """UTF-8, with or without the byte-order mark that spreadsheets write."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix="save it as UTF-8") from error


def _mirror_indices(folder: Path, names: Any, labels: tuple[str, ...]) -> dict[int, int]:
    try:
        return {labels.index(a): labels.index(b) for a, b in names.items()}
    except (AttributeError, ValueError) as error:
        raise DataError(
            f"the mirror table in {folder / DATASET_FILE} does not fit {LABELS_FILE}",
            why=str(error),
        ) from error


def _parse_rows(path: Path, content: str, classes: int, outside: bool) -> Iterable[Row]:
    reader = csv.DictReader(io.StringIO(content))
    names = [f.name for f in fields(Row)]
    missing = set(names) - set(reader.fieldnames or [])
    if missing:
        raise DataError(
            f"{path} lacks the columns {', '.join(sorted(missing))}",
            fix="run `ogreg prepare` again",
        )
    for cells in reader:
        where = f"{path} line {reader.line_num}"
        try:
            row = Row(
                path=cells["path"],
                label=int(cells["label"]),
                frames=int(cells["frames"]),
                fps=float(cells["fps"]),
                duration=float(cells["duration"]),
                width=int(cells["width"]),
                height=int(cells["height"]),
                decoder=sys.intern(cells["decoder"]),
                variable_rate=bool(int(cells["variable_rate"])),
                rotation=int(cells["rotation"]),
                codec=sys.intern(cells["codec"]),
            )
        except (TypeError, ValueError) as error:
            raise DataError(
                "a manifest line cannot be read", where=where, why=str(error)
            ) from error
        if not outside and _escapes(row.path):
            raise DataError(
                f"{row.path} lies outside the data set's folder",
                where=where,
                why="paths of a manifest are relative to its video root",
                fix="ogreg prepare list ... --allow-outside, if it is meant",
            )
        if row.label != UNLABELLED and not 0 <= row.label < classes:
            raise DataError(
                f"label {row.label} is not one of {classes} classes",
                where=where,
                why=f"{LABELS_FILE} has {classes} lines; labels count from 0",
            )
        if row.frames < 1:
            raise DataError("a video without frames", where=where)
        if not (0 < row.fps < math.inf and 0 < row.duration < math.inf):
            raise DataError("fps and duration must be above 0", where=where)
        yield row


def _escapes(path: str) -> bool:
    """Whether a relative path leaves the folder it is relative to."""
    return os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == os.pardir
