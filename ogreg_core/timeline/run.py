"""A checkpoint slid over a long video: scores of windows, and the events that they make."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ogreg_core.data.loader import Views, load_timed_views
from ogreg_core.data.manifest import Manifest
from ogreg_core.errors import UsageError, VideoError
from ogreg_core.inference import DEADLINE_SECONDS, Predictor, within
from ogreg_core.progress import Progress, ProgressCallback
from ogreg_core.timeline.boxes import WindowBoxes, boxes_of_event, check_gaze, look_at_window
from ogreg_core.timeline.events import (
    LOW_SHARE,
    Event,
    EventRules,
    Smoothing,
    cells,
    find_events,
    smooth,
)
from ogreg_core.timeline.source import Heed, Source, WindowViews, open_source, read_windows
from ogreg_core.timeline.windows import Plan, default_window

__all__ = ["Timeline", "TimelineOptions", "make_timeline"]


@dataclass(frozen=True)
class TimelineOptions:
    """How a long video is scored; None: see :func:`make_timeline`.

    Args:
        window_s: length of a window in seconds.
        hop_s: distance of their starts in seconds.
        smoothing: see :func:`ogreg_core.timeline.events.smooth`.
        threshold: see :class:`ogreg_core.timeline.events.EventRules`.
        min_length_s, max_gap_s: likewise.
        batch: windows that pass through the model together.
        boxes: whether events get boxes of the gaze.
        deadline: seconds that a frame may take.
    """

    window_s: float | None = None
    hop_s: float | None = None
    smoothing: Smoothing = "gaussian"
    threshold: float = 0.5
    min_length_s: float | None = None
    max_gap_s: float | None = None
    batch: int = 8
    boxes: bool = False
    deadline: float = DEADLINE_SECONDS


@dataclass(frozen=True)
class Timeline:
    """Scores and events of a long video.

    Args:
        source: the video.
        labels: class names by index.
        window_s, hop_s: as used.
        window_from: where the window's length comes from, in words.
        smoothing, rules: as used.
        starts, ends: of the windows, seconds from the first frame, float64 ``[N]``.
        scores: of the windows, float32 ``[N, classes]``.
        borders: of the cells of smoothed scores, seconds ``[cells + 1]``.
        curves: smoothed scores, float32 ``[cells, classes]``; not a number where nothing was read.
        events: in the order of time.
        read_to_s: where the last frame that was read ends.
        missing: frames that windows took and that did not decode.
        frames: different frames that were decoded, scaled and kept, each once.
        trouble: why the file was not read to its end, or not as it should be; None if it was.
        seconds: how long decoding and scoring took.
    """

    source: Source
    labels: list[str]
    window_s: float
    hop_s: float
    window_from: str
    smoothing: Smoothing
    rules: EventRules
    starts: np.ndarray
    ends: np.ndarray
    scores: np.ndarray
    borders: np.ndarray
    curves: np.ndarray
    events: list[Event]
    read_to_s: float
    missing: int
    frames: int
    trouble: VideoError | None
    seconds: float


@dataclass
class _Scored:
    """What a pass over a video gives."""

    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    boxes: list[WindowBoxes | None] = field(default_factory=list)
    last_frame: int = -1
    frames: int = 0
    missing: int = 0
    trouble: VideoError | None = None

    def note_frame(self, number: int) -> None:
        """A frame was decoded and kept."""
        self.last_frame = number
        self.frames += 1


def make_timeline(
    predictor: Predictor,
    path: str | Path,
    views: Views | None = None,
    options: TimelineOptions | None = None,
    *,
    on_progress: ProgressCallback,
    heed: Heed = lambda: None,
) -> Timeline:
    """Score a video in windows and find its events; memory does not grow with its length, but for
    scores and the index of its packets.

    A window of the checkpoint's own clip length is the default, hops of half a window, events of at
    least half a window, and gaps up to that. A file that breaks is scored as far as it can be read.

    Args:
        predictor: the checkpoint.
        path: the video.
        views: test protocol of each window; default: the checkpoint's.
        options: see there.
        on_progress: told of every batch of windows.
        heed: see :data:`ogreg_core.timeline.source.Heed`.

    Raises:
        VideoError: nothing can be read.
        UsageError: an image, impossible lengths, or boxes of a model without gaze.
    """
    options = options or TimelineOptions()
    views = views or predictor.info.views()
    if options.boxes:
        check_gaze(predictor.info)
    begun = time.monotonic()
    source = open_source(path, options.deadline)
    lengths = _lengths(predictor, source, options)
    rules = EventRules(options.threshold, lengths.min_length_s, lengths.max_gap_s)
    work = _Work(predictor, views, options, on_progress, heed)
    plan, found = work.run(source, lengths.window_s, lengths.hop_s)
    starts, ends, scores = np.array(found.starts), np.array(found.ends), np.stack(found.scores)
    borders = cells(source.row.duration, lengths.hop_s)
    curves = smooth(starts, ends, scores, borders, options.smoothing)
    events = find_events(curves, borders, rules)
    if options.boxes:
        events = [replace(e, boxes=boxes_of_event(e, found.boxes)) for e in events]
    read_to = source.row.duration
    if found.trouble is not None:
        read_to = min(float(source.seconds[found.last_frame]) + 1 / source.row.fps, read_to)
    return Timeline(
        source=source,
        labels=predictor.info.labels,
        window_s=plan.window_s,
        hop_s=lengths.hop_s,
        window_from=lengths.window_from,
        smoothing=options.smoothing,
        rules=rules,
        starts=starts,
        ends=ends,
        scores=scores,
        borders=borders,
        curves=curves,
        events=events,
        read_to_s=read_to,
        missing=found.missing,
        frames=found.frames,
        trouble=found.trouble,
        seconds=time.monotonic() - begun,
    )


@dataclass(frozen=True)
class _Lengths:
    """The lengths of a timeline in seconds, defaults filled in; and where the window's is from."""

    window_s: float
    window_from: str
    hop_s: float
    min_length_s: float
    max_gap_s: float


def _lengths(predictor: Predictor, source: Source, options: TimelineOptions) -> _Lengths:
    """Raises UsageError where windows would leave something out."""
    window_s, window_from = options.window_s, "as asked for"
    if window_s is None:
        window_s, window_from = default_window(predictor.info, source.row)
    window_s = min(window_s, source.row.duration)
    half = window_s / 2
    hop_s = half if options.hop_s is None else options.hop_s
    if hop_s > window_s:
        raise UsageError(
            f"--hop {hop_s:g} is longer than a window of {window_s:g} s",
            why="what lies between two windows would not be looked at",
            fix=f"--hop {half:g}",
        )
    if hop_s < 1 / source.row.fps and options.hop_s is not None:
        raise UsageError(
            f"--hop {hop_s:g} is shorter than a frame of {source.info.path}",
            why=f"its frames are {1 / source.row.fps:.3g} s apart",
            fix=f"--hop {half:g}",
        )
    return _Lengths(
        window_s,
        window_from,
        hop_s,
        half if options.min_length_s is None else options.min_length_s,
        half if options.max_gap_s is None else options.max_gap_s,
    )


@dataclass(frozen=True)
class _Work:
    """One way of scoring, whatever the video."""

    predictor: Predictor
    views: Views
    options: TimelineOptions
    on_progress: ProgressCallback
    heed: Heed

    def run(self, source: Source, window_s: float, hop_s: float) -> tuple[Plan, _Scored]:
        """Score what can be read.

        Raises:
            VideoError: nothing can.
        """
        look_up = source.reader.indices_at
        plan = Plan(source.row, self.views, window_s, hop_s, look_up)
        found = self._pass(source, plan)
        if not found.scores and found.last_frame >= 0:
            # It breaks within the first window: what was read of that is all there is.
            source = source.shortened(found.last_frame + 1)
            plan = Plan(source.row, self.views, window_s, hop_s, look_up)
            trouble, found = found.trouble, self._pass(source, plan)
            found.trouble = found.trouble or trouble
        if not found.scores:
            raise found.trouble or _breaks_off(source)
        return plan, found

    def _pass(self, source: Source, plan: Plan) -> _Scored:
        found = _Scored(trouble=source.trouble)
        windows = self._whole(source, plan, found) or self._streamed(source, plan, found)
        begun = time.monotonic()
        for batch in _batches(windows, self.options.batch):
            self._score(batch, source, found)
            pace = found.frames / max(time.monotonic() - begun, 1e-9)
            done = batch[-1].window.number + 1
            self.on_progress(Progress("windows", done, len(plan), {"frames_per_s": pace}))
            self.heed()
        if found.trouble is None and (len(found.scores) < len(plan) or found.missing):
            found.trouble = _breaks_off(source)
        return found

    def _whole(self, source: Source, plan: Plan, found: _Scored) -> list[WindowViews]:
        """The only window of a sound file, read as ``predict`` reads it: some containers have a faster
        reader than a pass over all frames, whose pixels are rounded in another way.
        """
        if len(plan) > 1 or source.trouble is not None:
            return []
        path = Path(source.info.path)
        manifest = Manifest(root=path.parent, split="", rows=(source.row,), labels=("",))
        window = plan[0]
        try:
            read = within(
                lambda: load_timed_views(manifest, source.row, self.views),
                str(path),
                self.options.deadline,
            )
        except VideoError as error:
            found.trouble = error
            return []
        for number in window.frames:
            found.note_frame(number)
        return [WindowViews(window, read.views, 0, read.times)]

    def _streamed(self, source: Source, plan: Plan, found: _Scored) -> Iterator[WindowViews]:
        windows = read_windows(source, plan, self.heed, found.note_frame, self.options.deadline)
        try:
            yield from windows
        except VideoError as error:
            found.trouble = error

    def _score(self, batch: list[WindowViews], source: Source, found: _Scored) -> None:
        views = torch.stack([item.views for item in batch])
        times = torch.stack([item.times for item in batch])
        scores = self.predictor.score(views, times).numpy()
        for item, row in zip(batch, scores, strict=True):
            found.starts.append(item.window.start_s)
            found.ends.append(item.window.end_s)
            found.scores.append(row)
            found.missing += item.missing
            if self.options.boxes:
                # An event holds a window that reaches the lower threshold, or none of its cells would.
                likely = row.max() >= LOW_SHARE * self.options.threshold
                look = self.predictor, item, source, self.views.crops
                seen = look_at_window(*look) if likely else None
                found.boxes.append(seen)


def _batches(windows: Iterable[WindowViews], size: int) -> Iterator[list[WindowViews]]:
    iterator = iter(windows)
    while batch := list(islice(iterator, size)):
        yield batch


def _breaks_off(source: Source) -> VideoError:
    return VideoError(
        f"{source.info.path} breaks off: its frames are damaged",
        code="damaged",
        why="frames that its container lists do not decode",
        fix="fetch the file again",
    )
