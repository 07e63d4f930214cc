"""The work on one file of a data set, done in a worker process: check it, re-encode it if asked."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogreg_core.data.manifest import Row
from ogreg_core.datasets.journal import Record
from ogreg_core.errors import VideoError
from ogreg_core.processes import Lost

if TYPE_CHECKING:
    from ogreg_core.video import Verification, VideoInfo
    from ogreg_core.video.transcode import TranscodeSettings

__all__ = ["FileJob", "check_file", "copies_folder", "copy_path", "record_of", "row_of"]


@dataclass(frozen=True)
class FileJob:
    """One file to check.

    Args:
        root: folder that ``path`` is relative to.
        path: the file.
        size: bytes.
        modified_ns: modification time, nanoseconds.
        verify: how much to decode.
        resize: how to re-encode it; None: not at all.
        folder: where the manifest goes.
        copy: the re-encoded copy, relative to ``folder``.
    """

    root: str
    path: str
    size: int
    modified_ns: int
    verify: Verification
    resize: TranscodeSettings | None = None
    folder: str = ""
    copy: str = ""


def copies_folder(resize: TranscodeSettings) -> str:
    """The folder of re-encoded copies, relative to the manifest."""
    rate = f"-{resize.fps:g}fps" if resize.fps else ""
    return f"resized-{resize.short_side}px{rate}"


def copy_path(path: str, resize: TranscodeSettings) -> str:
    """Where the copy of a file goes, relative to the manifest."""
    # Neither an absolute path nor one through '..' may lead out of the folder of copies.
    parts = [part for part in Path(path).parts if part not in (os.pardir, Path(path).anchor)]
    inside = "/".join(parts)
    suffix = "" if inside.lower().endswith(".mp4") else ".mp4"
    return f"{copies_folder(resize)}/{inside}{suffix}"


def check_file(job: FileJob) -> tuple[Row, int] | VideoError:
    """The manifest row (its label still to be set) and the size of the copy, 0 if there is none; or
    what is wrong with the file.
    """
    from ogreg_core.video import probe

    source = os.path.join(job.root, job.path)
    try:
        with open(source, "rb") as file:
            file.read(1)
    except OSError as error:
        # Of the disk or the rights, not of the file: no verdict on the video.
        return VideoError(f"{source} cannot be read", code="unreadable", why=str(error.strerror))
    try:
        info = probe(source, job.verify)
        if job.resize is None:
            return _row(job.path, info), 0
        return _make_copy(job, info)
    except VideoError as error:
        return error


def _row(path: str, info: VideoInfo) -> Row:
    row = Row.from_probe(path, info)
    return replace(row, fps=round(row.fps, 4), duration=round(row.duration, 4))


def _make_copy(job: FileJob, original: VideoInfo) -> tuple[Row, int]:
    from ogreg_core.video import probe
    from ogreg_core.video.packets import read_packet_index
    from ogreg_core.video.transcode import expected_frames, transcode

    assert job.resize is not None
    copy = Path(job.folder) / job.copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    frames = transcode(original.path, copy, job.resize)
    promised = expected_frames(read_packet_index(original.path), job.resize)
    if frames < promised:
        copy.unlink()
        raise VideoError(
            f"{original.path} does not hold the frames it promises",
            code="frame-count",
            why=f"{frames} of {promised} frames decode",
        )
    return _row(job.copy, probe(copy)), copy.stat().st_size


def row_of(content: Mapping[str, Any], label: int) -> Row:
    """The manifest row of a record's ``row``."""
    # The same few words in every row of a large table are kept once.
    words = {key: sys.intern(content[key]) for key in ("decoder", "codec")}
    return Row(label=label, **{**content, **words})


def record_of(job: FileJob, result: tuple[Row, int] | VideoError | Lost, deadline: float) -> Record:
    """What the journal keeps of a result: ``row`` (and ``copy_size``), or ``code`` and ``detail``."""
    record: dict[str, Any] = {
        "path": job.path,
        "size": job.size,
        "modified_ns": job.modified_ns,
    }
    if isinstance(result, Lost):
        return {**record, "code": result.code, "detail": result.detail, "deadline": deadline}
    if isinstance(result, VideoError):
        # Messages name the full path, which is this machine's business.
        text = f"{result.what}. {result.why}".strip(" .")
        detail = text.replace(os.path.join(job.root, job.path), job.path)
        return {**record, "code": result.code, "detail": detail}
    row, copy_size = result
    content = asdict(row)
    del content["label"]
    return {**record, "row": content, **({"copy_size": copy_size} if job.resize else {})}
