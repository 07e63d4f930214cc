"""A timeline as files: JSON, CSV of windows and of events, WebVTT."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ogreg_core.files import write_text_atomic
from ogreg_core.timeline.events import LOW_SHARE, Event
from ogreg_core.timeline.run import Timeline

__all__ = [
    "document_of",
    "save_csv_of_events",
    "save_csv_of_windows",
    "save_json",
    "save_web_vtt",
]


def document_of(found: Timeline, name: Callable[[Any], list[tuple[str, float]]]) -> dict[str, Any]:
    """The timeline as one JSON document, schema ``ogreg.timeline.v1``.

    Args:
        found: the timeline.
        name: the best classes of a window's scores as (label, score).
    """
    row, trouble = found.source.row, found.trouble
    return {
        "schema": "ogreg.timeline.v1",
        "path": str(Path(found.source.info.path).resolve()),
        "status": "ok" if trouble is None else "incomplete",
        "reason": "" if trouble is None else str(trouble),
        "duration_s": row.duration,
        "read_to_s": found.read_to_s,
        "frames": row.frames,
        "frames_used": found.frames,
        "frames_missing": found.missing,
        "width": row.width,
        "height": row.height,
        "window_s": found.window_s,
        "hop_s": found.hop_s,
        "smoothing": found.smoothing,
        "threshold": found.rules.threshold,
        "low_threshold": LOW_SHARE * found.rules.threshold,
        "min_length_s": found.rules.min_length_s,
        "max_gap_s": found.rules.max_gap_s,
        "events": [_event_document(event, found.labels) for event in found.events],
        "windows": [
            {
                "start_s": start,
                "end_s": end,
                "top": [{"label": label, "score": score} for label, score in name(scores)],
            }
            for start, end, scores in _windows(found)
        ],
    }


def save_json(document: dict[str, Any], path: Path) -> None:
    """Write a document, readable for people too; atomically."""
    write_text_atomic(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _windows(found: Timeline) -> Iterable[tuple[float, float, Any]]:
    return zip(found.starts.tolist(), found.ends.tolist(), found.scores, strict=True)


def _event_document(event: Event, labels: Sequence[str]) -> dict[str, Any]:
    content = {
        "start_s": event.start_s,
        "end_s": event.end_s,
        "label": labels[event.label],
        "score": event.score,
        "peak": event.peak,
    }
    if event.boxes is not None:
        content["boxes"] = [asdict(box) for box in event.boxes]
    return content


def save_csv_of_windows(
    found: Timeline, name: Callable[[Any], list[tuple[str, float]]], path: Path
) -> None:
    """A row per window: its times and its best classes, ``label_1,score_1,label_2,...``."""
    best = len(name(found.scores[0]))
    header = [f"{what}_{rank}" for rank in range(1, best + 1) for what in ("label", "score")]
    rows = [
        [f"{start:.3f}", f"{end:.3f}", *_flat(name(scores))]
        for start, end, scores in _windows(found)
    ]
    _save_csv(["start_s", "end_s", *header], rows, path)


def _flat(named: Sequence[tuple[str, float]]) -> list[str]:
    return [cell for label, score in named for cell in (label, f"{score:.6f}")]


def save_csv_of_events(found: Timeline, path: Path) -> None:
    """A row per event: start, end, label, mean and highest score."""
    rows = [
        [
            *(f"{event.start_s:.3f}", f"{event.end_s:.3f}", found.labels[event.label]),
            *(f"{event.score:.6f}", f"{event.peak:.6f}"),
        ]
        for event in found.events
    ]
    _save_csv(["start_s", "end_s", "label", "score", "peak"], rows, path)


def _save_csv(header: Sequence[str], rows: Iterable[Sequence[str]], path: Path) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text_atomic(path, buffer.getvalue())


def save_web_vtt(found: Timeline, path: Path) -> None:
    """Events as WebVTT, which players show as subtitles or chapters."""
    cues = [
        f"{number}\n{_clock(event.start_s)} --> {_clock(event.end_s)}\n"
        f"{_escaped(found.labels[event.label])} {100 * event.score:.0f}%\n"
        for number, event in enumerate(found.events, start=1)
    ]
    write_text_atomic(path, "\n".join(["WEBVTT\n", *cues]))


def _clock(seconds: float) -> str:
    """``hh:mm:ss.mmm``."""
    thousandths = round(1000 * seconds)
    minutes, rest = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}.{rest % 1000:03}"


def _escaped(label: str) -> str:
    """Cue text of one line: no markup, no line break and no arrow of its own."""
    text = label.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split()) or "-"
