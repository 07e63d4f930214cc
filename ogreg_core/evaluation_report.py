"""What an evaluation found, as a document and as a folder of files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from ogreg_core.confusion_picture import save_confusion
from ogreg_core.evaluation import Metrics, Scores, confusion_matrix, metrics_of, ranks
from ogreg_core.expectations import Expectation, check_expectations
from ogreg_core.files import write_atomic
from ogreg_core.run_records import thousands
from ogreg_core.runs import RunFolder
from ogreg_core.saved_scores import SCORES_FILE, SavedScores

__all__ = ["EvaluationReport"]

_SCHEMA = "ogreg.eval.v1"
# Up to so many classes `scores.csv` holds all scores, and of more classes so many of the best.
_FULL_CLASSES = 50
_LISTED_CLASSES = 5


@dataclass(frozen=True)
class EvaluationReport:
    """Everything an evaluation found.

    Args:
        document: the figures with their circumstances, ready for JSON.
        metrics: the accuracies.
        saved: the scores of every video.
    """

    document: dict[str, Any]
    metrics: Metrics
    saved: SavedScores

    @classmethod
    def of(cls, saved: SavedScores) -> EvaluationReport:
        """Compute the metrics of scores."""
        metrics = metrics_of(saved.found.scores, saved.found.labels, saved.missed())
        return cls(_document(saved, metrics), metrics, saved)

    @property
    def scores(self) -> Scores:
        """Of the videos that could be read, and which could not."""
        return self.saved.found

    def expecting(self, expectations: Sequence[Expectation]) -> EvaluationReport:
        """The same with the outcome of expectations in the document; none add nothing."""
        if not expectations:
            return self
        figures = self.metrics.figures()
        if self.document["top5_pct"] is None:
            figures["top5"] = math.nan
        outcome = check_expectations(expectations, figures)
        outcome = [{**item, "reached_pct": _number(item["reached_pct"])} for item in outcome]
        return replace(self, document={**self.document, "expectations": outcome})

    def finished(self, moment: datetime | None = None) -> EvaluationReport:
        """The same with the time at which it was finished in the document; None is
        this moment.
        """
        moment = (moment or datetime.now(timezone.utc)).astimezone(timezone.utc)
        text = moment.isoformat(timespec="seconds")
        return replace(self, document={**self.document, "finished": text})

    def missed_expectations(self) -> list[str]:
        """A sentence for each expectation that was not met."""
        return [
            f"expected {item['expected']}, reached {_text(item['reached_pct'])}"
            for item in self.document.get("expectations", [])
            if not item["met"]
        ]

    def write(self, run: RunFolder) -> None:
        """``scores.safetensors`` first, from which all the others can be made again; ``scores.csv``,
        ``per_class.csv`` and ``confusion.png``; and ``report.json`` last.

        ``scores.csv`` has a line per video of the manifest: ``path``, ``label``, ``predicted``,
        ``probability``, ``rank`` of the label, and a column ``score:<class>`` for each of at most 50
        classes. Of more classes it has the five best, ``class_1``, ``score_1`` and so on.
        """
        self.saved.write(run.path / SCORES_FILE)
        labels = self.saved.labels
        header = ["path", "label", "predicted", "probability", "rank", *self._score_columns()]
        _write_csv(run.path / "scores.csv", header, self._score_rows())
        per_class = zip(labels, self.metrics.per_class_videos, self.metrics.per_class, strict=True)
        _write_csv(
            run.path / "per_class.csv",
            ["class", "videos", "top1_pct"],
            (
                [name, count, "" if top1 is None else f"{top1:.4f}"]
                for name, count, top1 in per_class
            ),
        )
        about, found = self.saved.about, self.saved.found
        matrix = confusion_matrix(found.scores, found.labels).numpy()
        title = (
            f"{about['model']} on {about['dataset']}/{about['split']}: {self.document['summary']}"
        )
        if found.unreadable:
            title += f"\n{thousands(len(found.unreadable))} unreadable not shown"
        save_confusion(run.path / "confusion.png", matrix, labels, title)
        run.write_json("report.json", self.document)

    def _score_rows(self) -> Iterator[list[Any]]:
        """A line per video: prediction, its probability, the true class's rank, and scores."""
        columns = len(self._score_columns())
        found, labels = self.saved.found, self.saved.labels
        place = dict(zip(found.indices.tolist(), range(len(found.indices)), strict=True))
        rank = ranks(found.scores, found.labels).tolist()
        for row, path in enumerate(self.saved.paths):
            start = [path, labels[int(self.saved.targets[row])]]
            if row not in place:
                yield [*start, *[""] * (3 + columns)]
                continue
            scores = found.scores[place[row]]
            cells = self._score_cells(scores)
            if scores.isnan().any():
                yield [*start, "", "", "", *cells]
                continue
            best = int(scores.argmax())
            probability = f"{float(scores[best]):.6f}"
            yield [*start, labels[best], probability, rank[place[row]], *cells]

    def _score_columns(self) -> list[str]:
        if len(self.saved.labels) <= _FULL_CLASSES:
            return [f"score:{name}" for name in self.saved.labels]
        numbers = range(1, 1 + _LISTED_CLASSES)
        return [f"{word}_{number}" for number in numbers for word in ("class", "score")]

    def _score_cells(self, scores: Tensor) -> list[str]:
        """A video's scores ``[classes]`` under the names of ``_score_columns``."""
        labels = self.saved.labels
        if len(labels) <= _FULL_CLASSES:
            return [f"{score:.6f}" for score in scores.tolist()]
        if scores.isnan().any():
            return [""] * len(self._score_columns())
        # Stable: of equal scores the lower class comes first, as in the prediction.
        best = scores.sort(descending=True, stable=True).indices[:_LISTED_CLASSES].tolist()
        return [cell for i in best for cell in (labels[i], f"{float(scores[i]):.6f}")]


def _write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    def fill(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    write_atomic(path, fill)


def _document(saved: SavedScores, metrics: Metrics) -> dict[str, Any]:
    of = _whole(saved, metrics) if saved.about["annotated_videos"] else None
    scored = metrics.videos - metrics.unreadable
    # Of five classes all are among the five best.
    has_top5 = len(saved.labels) > 5
    return {
        "schema": _SCHEMA,
        **saved.about,
        "summary": _summary(saved, metrics),
        "top1_pct": metrics.top1,
        "top1_interval_pct": list(metrics.interval(metrics.top1)),
        "top5_pct": metrics.top5 if has_top5 else None,
        "top5_interval_pct": list(metrics.interval(metrics.top5)) if has_top5 else None,
        "mean_class_pct": metrics.mean_class,
        "ece_pct": _number(metrics.ece),
        "loss": _number(metrics.loss),
        "videos": metrics.videos,
        "scored_videos": scored,
        "unreadable": [asdict(video) for video in saved.found.unreadable],
        "coverage_pct": 100.0 * scored / of if of else None,
    }


def _whole(saved: SavedScores, metrics: Metrics) -> int:
    """Videos that there are: annotated, or in the manifest if somebody has added rows to it."""
    return max(saved.about["annotated_videos"] or 0, metrics.videos)


def _summary(saved: SavedScores, metrics: Metrics) -> str:
    """The score with the protocol that it was reached by, as it should be quoted."""
    scored = metrics.videos - metrics.unreadable
    counts = f"{thousands(scored)} of {thousands(_whole(saved, metrics))} videos"
    return f"top-1 {metrics.top1:.1f} ({saved.about['protocol']}, {counts})"


def _number(value: float) -> float | None:
    """JSON has no word for what is not a number."""
    return value if math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "no number" if value is None else f"{value:.2f}"
