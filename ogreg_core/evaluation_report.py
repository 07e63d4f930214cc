"""What an evaluation found, as a document and as a folder of files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ogreg_core.confusion_picture import save_confusion
from ogreg_core.evaluation import Metrics, Scores, confusion_matrix, metrics_of, ranks
from ogreg_core.expectations import Expectation, check_expectations
from ogreg_core.files import write_atomic
from ogreg_core.runs import RunFolder
from ogreg_core.saved_scores import SCORES_FILE, SavedScores

__all__ = ["EvaluationReport"]

_SCHEMA = "ogreg.eval.v1"


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
        outcome = check_expectations(expectations, self.metrics.figures())
        outcome = [{**item, "reached_pct": _number(item["reached_pct"])} for item in outcome]
        return replace(self, document={**self.document, "expectations": outcome})

    def missed_expectations(self) -> list[str]:
        """A sentence for each expectation that was not met."""
        return [
            f"expected {item['expected']}, reached {_text(item['reached_pct'])}"
            for item in self.document.get("expectations", [])
            if not item["met"]
        ]

    def write(self, run: RunFolder) -> None:
        """``scores.safetensors``, ``scores.csv``, ``per_class.csv`` and ``confusion.png`` into a run
        folder, and ``report.json`` last.
        """
        self.saved.write(run.path / SCORES_FILE)
        labels = self.saved.labels
        _write_csv(
            run.path / "scores.csv",
            ["path", "label", "predicted", "probability", "rank", *(f"score:{n}" for n in labels)],
            self._score_rows(),
        )
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
        save_confusion(run.path / "confusion.png", matrix, labels, title)
        run.write_json("report.json", self.document)

    def _score_rows(self) -> Iterator[list[Any]]:
        """A line per video: prediction, its probability, the true class's rank, and all scores."""
        found, labels = self.saved.found, self.saved.labels
        place = dict(zip(found.indices.tolist(), range(len(found.indices)), strict=True))
        rank = ranks(found.scores, found.labels).tolist()
        for row, path in enumerate(self.saved.paths):
            start = [path, labels[int(self.saved.targets[row])]]
            if row not in place:
                yield [*start, *[""] * (3 + len(labels))]
                continue
            scores = found.scores[place[row]]
            cells = [f"{score:.6f}" for score in scores.tolist()]
            if scores.isnan().any():
                yield [*start, "", "", "", *cells]
                continue
            best = int(scores.argmax())
            yield [*start, labels[best], cells[best], rank[place[row]], *cells]


def _write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    def fill(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)

    write_atomic(path, fill)


def _document(saved: SavedScores, metrics: Metrics) -> dict[str, Any]:
    annotated = saved.about["annotated_videos"]
    scored = metrics.videos - metrics.unreadable
    return {
        "schema": _SCHEMA,
        **saved.about,
        "summary": _summary(saved, metrics),
        "top1_pct": metrics.top1,
        "top1_interval_pct": list(metrics.interval(metrics.top1)),
        "top5_pct": metrics.top5,
        "top5_interval_pct": list(metrics.interval(metrics.top5)),
        "mean_class_pct": metrics.mean_class,
        "ece_pct": _number(metrics.ece),
        "loss": _number(metrics.loss),
        "videos": metrics.videos,
        "unreadable": [asdict(video) for video in saved.found.unreadable],
        "coverage_pct": 100.0 * scored / annotated if annotated else None,
    }


def _summary(saved: SavedScores, metrics: Metrics) -> str:
    """The score with the protocol that it was reached by, as it should be quoted."""
    scored = metrics.videos - metrics.unreadable
    of = saved.about["annotated_videos"] or metrics.videos
    counts = f"{scored:,} of {of:,} videos".replace(",", " ")
    return f"top-1 {metrics.top1:.1f} ({saved.about['protocol']}, {counts})"


def _number(value: float) -> float | None:
    """JSON has no word for what is not a number."""
    return value if math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "no number" if value is None else f"{value:.2f}"
