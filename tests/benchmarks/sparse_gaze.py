"""Accuracy against the work that the sparse Gaze really does, threshold by threshold.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/sparse_gaze.py RUN [RUN ...] --data FOLDER
[--thresholds 0,0.1,1] [--study tokens --results FOLDER_OF_ITS_TRAININGS]``. Each RUN is a checkpoint or run
folder of the same experiment with another seed. Every threshold is scored on the validation videos as ``ogreg
eval`` does. Multiply-adds are those of the dense model by fvcore less those of the temporal taps that were
skipped, mean over the videos; milliseconds are medians over a few of the videos, one at a time, dense and
sparse in turn. A study of STTS on the same data set is drawn beside it, from trainings that have ended.

What can be saved is bounded, and little: depthwise temporal taps are 1.2 % of the multiply-adds of ogreg-n at
8x112 and 0.6 % of those of ogreg-t at 32x224; attention, projections and MLPs are the rest. The bound is
printed for both, by torch's counter, and for the checkpoints. Time hardly follows: a gathered multiply-add
costs many times one of a dense convolution, see :mod:`ogreg_core.models.sparse_gaze`.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ogreg_core.data.loader import ViewDataset
from ogreg_core.data.transforms import to_input
from ogreg_core.evaluate_checkpoint import Evaluation, open_evaluation
from ogreg_core.evidence.comparison import Cell
from ogreg_core.evidence.report import summary_of
from ogreg_core.evidence.runner import DataSet, Plan
from ogreg_core.evidence.study import load_study
from ogreg_core.files import write_atomic
from ogreg_core.label_places import place_labels
from ogreg_core.models.protocol import logits_of
from ogreg_core.models.registry import create_model, find_model
from ogreg_core.models.sparse_gaze import SparseWork, sparse_gaze
from ogreg_core.profile_picture_parts import (
    COLOURS,
    CONVENTION,
    SMALL_PT,
    TEXT_PT,
    entitle,
    new_figure,
    settle,
)
from ogreg_core.profiling import count_multiply_adds, measure_in_turn
from ogreg_core.profiling.counting import observe
from ogreg_core.progress import ignore_progress
from ogreg_core.runs import find_checkpoint
from tests.benchmarks.record import build_parser, finish, say

CPU = torch.device("cpu")
DENSE = "dense"
BOUND_OF = ("ogreg-n", "ogreg-t")
_PANEL_INCHES = 3.0
# Of a study's curves; OG-ReG's own colour is the second.
_OTHERS = (COLOURS[0], *COLOURS[2:])
# Boxes that a piece of a curve is cut into, for names to keep clear of.
_STEPS = 20


class Point(NamedTuple):
    """A checkpoint at a threshold: percent right, share of open places in 0..1, billions of multiply-adds
    per view, milliseconds per clip.
    """

    top1: float
    share: float
    gmacs: float
    ms: float


class Dot(NamedTuple):
    """In the picture: billions of multiply-adds, top-1 in percent by seed, and its name."""

    gmacs: float
    top1s: Sequence[float]
    name: str


# --- what is measured ---------------------------------------------------------------------------


def bound_row(name: str) -> dict[str, Any]:
    """The share of temporal taps in a model at its usual input: what it has more than its 2-D form, by
    torch's counter.
    """
    entry = find_model(name)
    counts = []
    with torch.device("meta"):
        clip = torch.empty(1, 3, entry.frames, entry.size, entry.size)
        for gaze in ("modulated", "2d"):
            counts.append(observe(create_model(name, 400, gaze=gaze), clip).multiply_adds)
    return {
        "way": f"bound, {name} {entry.frames}x{entry.size}",
        "gmacs": counts[1] / 1e9,
        "saved_pct": 100 * (1 - counts[1] / counts[0]),
    }


def clips_of(evaluation: Evaluation, count: int) -> list[tuple[Tensor, Tensor | None]]:
    """The first view of so many videos, spread over the split, and the times of its frames."""
    info = evaluation.info
    dataset = ViewDataset(evaluation.manifest, evaluation.views)
    found = []
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        batch = dataset[index]
        if batch.unreadable:
            raise SystemExit(f"{batch.unreadable[0].path}: {batch.unreadable[0].reason}")
        times = None if batch.times is None else batch.times[:, 0]
        found.append((to_input(batch.views[:, 0], info.mean, info.std), times))
    return found


def pass_through(
    model: nn.Module, clips: Sequence[tuple[Tensor, Tensor | None]], threshold: float | None
) -> SparseWork | None:
    """All clips, one at a time; dense if there is no threshold."""
    if threshold is not None:
        with sparse_gaze(model, threshold) as work:
            pass_through(model, clips, None)
        return work
    with torch.inference_mode():
        for clip, times in clips:
            logits_of(model, clip, times)
    return None


def points_of(
    evaluation: Evaluation, thresholds: Sequence[float], options: argparse.Namespace
) -> tuple[dict[float | str, Point], float]:
    """One checkpoint at all thresholds and dense; and its billions of multiply-adds without any temporal
    tap.
    """
    model, clips = evaluation.model, clips_of(evaluation, options.clips)
    total = count_multiply_adds(model, clips[0][0]).total
    first = pass_through(model, clips[:1], 1.0)
    assert first is not None
    taps = first.dense_multiply_adds
    ways: dict[float | str, float | None] = {DENSE: None, **{t: t for t in thresholds}}
    calls: dict[str, Callable[[], Any]] = {
        str(way): partial(pass_through, model, clips, t) for way, t in ways.items()
    }
    timings = measure_in_turn(calls, CPU, options.repeats, warmup=1)
    score = partial(
        evaluation.score,
        batch_size=options.batch,
        workers=options.workers,
        on_progress=ignore_progress,
    )
    found = {}
    for way, threshold in ways.items():
        share, executed = 1.0, 1.0
        if threshold is None:
            top1 = score().metrics.top1
        else:
            with sparse_gaze(model, threshold) as work:
                top1 = score().metrics.top1
            share, executed = work.share, work.multiply_adds / work.dense_multiply_adds
        ms = timings[str(way)].median_ms / len(clips)
        found[way] = Point(top1, share, (total - taps * (1 - executed)) / 1e9, ms)
    return found, (total - taps) / 1e9


def rows_of(seeds: Sequence[dict[float | str, Point]]) -> list[dict[str, Any]]:
    """A row for dense and each threshold, means over the seeds; dense comes first."""
    rows = []
    dense = [seed[DENSE] for seed in seeds]
    for way in seeds[0]:
        points = [seed[way] for seed in seeds]
        top1, share, gmacs, ms = (statistics.fmean(values) for values in zip(*points, strict=True))
        saved = 1 - gmacs / statistics.fmean(point.gmacs for point in dense)
        faster = statistics.median(d.ms / p.ms for d, p in zip(dense, points, strict=True))
        rows.append(
            {
                "way": way if way == DENSE else f"m > {way:g}",
                "top1_pct": top1,
                "open_pct": 100 * share,
                "gmacs": gmacs,
                "saved_pct": 100 * saved,
                "ms_per_clip": ms,
                "times_as_fast": faster,
                "top1_by_seed": [round(point.top1, 3) for point in points],
            }
        )
    return rows


def study_curves(
    options: argparse.Namespace, dataset: str, experiment: str
) -> dict[str, list[Cell]]:
    """Rows of a study that have results on the data set, by the setting that they change; each curve
    begins at the reference, which must be the experiment that the checkpoints are from.
    """
    if not options.study:
        return {}
    name, recipe, study = load_study(options.study)
    data = [DataSet.open(folder) for folder in options.study_data or [options.data]]
    plan = Plan(study, recipe, data, options.results)
    usual_row, here = study.row(study.reference), next(d for d in data if d.name == dataset)
    job = plan.test_job(usual_row, here, plan.seeds[0], plan.results())
    if job is None or job.identity.experiment != experiment:
        raise SystemExit(f"the checkpoints are not of the study's row {study.reference!r}")
    cells = summary_of(name, plan).cells
    found = [cell for cell in cells if cell.dataset == dataset and cell.top1s and cell.gmacs]
    usual = set(study.row(study.reference).changes)
    reference = [cell for cell in found if cell.row == study.reference]
    curves: dict[str, list[Cell]] = {}
    for cell in found:
        own = [change for change in study.row(cell.row).changes if change not in usual]
        settings = ", ".join(change.partition("=")[0] for change in own)
        if cell not in reference:
            curves.setdefault(settings, [*reference]).append(cell)
    return curves or ({"reference": reference} if reference else {})


# --- the picture --------------------------------------------------------------------------------


def draw(
    rows: Sequence[dict[str, Any]],
    least: float,
    curves: Mapping[str, Sequence[Cell]],
    about: str,
    path: Path,
) -> None:
    """Top-1 against multiply-adds: the sparse Gaze by itself and, if there is one, beside a study.

    Args:
        rows: from :func:`rows_of`.
        least: billions of multiply-adds without any temporal tap.
        curves: of the study, by the setting that is changed.
        about: the model, the data and the number of seeds.
        path: of the PNG file.
    """
    curve = [
        Dot(row["gmacs"], row["top1_by_seed"], f"{row['way']}: {row['open_pct']:.3g} % open")
        for row in rows[1:]
    ]
    curve.append(Dot(rows[0]["gmacs"], rows[0]["top1_by_seed"], DENSE))
    facts = [
        about,
        "dots: mean over seeds; whiskers: from the lowest to the highest; dashed: every temporal tap skipped",
        CONVENTION,
    ]
    panels = 1 + bool(curves)
    figure = new_figure(_PANEL_INCHES * panels, "Sparse Gaze", facts)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    _draw_curve(axes[0], curve, COLOURS[1], "sparse Gaze")
    axes[0].axvline(least, color="0.5", linewidth=0.8, linestyle="--", zorder=1)
    entitle(axes[0], "temporal taps executed where m exceeds a threshold; above: saved, % of all")
    dense = rows[0]["gmacs"]
    to_saved, to_gmacs = (lambda x: 100 * (1 - x / dense)), (lambda x: dense * (1 - x / 100))
    above = axes[0].secondary_xaxis("top", functions=(to_saved, to_gmacs))
    above.tick_params(labelsize=SMALL_PT)
    others: dict[str, Dot] = {}
    if curves:
        _draw_curve(axes[1], curve, COLOURS[1], "sparse Gaze, trained dense")
        for colour, (setting, cells) in zip(_OTHERS, curves.items(), strict=False):
            named = {c.row: Dot(c.gmacs or 0.0, [*c.top1s.values()], _named(c)) for c in cells}
            _draw_curve(axes[1], [*named.values()], colour, f"trained with {setting}")
            others |= named
        axes[1].legend(fontsize=SMALL_PT)
        entitle(axes[1], "the same beside trainings of the study")
    for ax in axes:
        ax.set_xlabel("multiply-adds per view, G", fontsize=TEXT_PT)
        ax.set_ylabel("top-1, %", fontsize=TEXT_PT)
        ax.grid(axis="y", color="0.92", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.margins(0.12, 0.2)
    renderer = settle(figure)
    for ax, dots in zip(axes, (curve, [*others.values()]), strict=False):
        _name_dots(ax, dots, renderer)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


def _named(cell: Cell) -> str:
    """The row, and how many of its seeds are there if not all."""
    seeds = len(cell.top1s)
    return (
        f"{cell.row} ({seeds} of {seeds + len(cell.missing)} seeds)" if cell.missing else cell.row
    )


def _draw_curve(ax: Any, dots: Sequence[Dot], colour: str, label: str) -> None:
    dots = sorted(dots)
    means = [statistics.fmean(dot.top1s) for dot in dots]
    down = [mean - min(dot.top1s) for mean, dot in zip(means, dots, strict=True)]
    up = [max(dot.top1s) - mean for mean, dot in zip(means, dots, strict=True)]
    style = {"marker": "o", "markersize": 4.5, "linewidth": 1.2, "elinewidth": 0.8, "capsize": 2}
    places = [dot.gmacs for dot in dots]
    ax.errorbar(places, means, [down, up], color=colour, label=label, **style)


def _name_dots(ax: Any, dots: Sequence[Dot], renderer: Any) -> None:
    """Names beside the dots, clear of each other, the whiskers and the curve."""
    texts = [ax.text(0, 0, dot.name, fontsize=SMALL_PT, parse_math=False) for dot in dots]
    sizes = np.array([text.get_window_extent(renderer).size + 6 for text in texts])

    def pixels(choose: Callable[[Sequence[float]], float]) -> np.ndarray:
        found: np.ndarray = ax.transData.transform([(d.gmacs, choose(d.top1s)) for d in dots])
        return found

    centres = pixels(statistics.fmean)
    lines = [np.hstack([pixels(min) - 3, pixels(max) + 3])]
    way = centres[np.argsort(centres[:, 0], kind="stable")]
    for start, end in pairwise(way):
        steps = start + np.linspace(0, 1, _STEPS)[:, None] * (end - start)
        lines.append(
            np.hstack([np.minimum(steps[:-1], steps[1:]), np.maximum(steps[:-1], steps[1:])])
        )
    frame = ax.get_window_extent(renderer).extents
    corners = place_labels(centres, sizes, frame, np.vstack(lines)) + 3
    for text, place in zip(texts, ax.transData.inverted().transform(corners), strict=True):
        text.set_position(tuple(place))
        text.set_verticalalignment("bottom")


# --- the run ------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All checkpoints; draws the picture, too."""
    evaluations = [
        open_evaluation(
            find_checkpoint(path),
            data=options.data,
            split=options.split,
            clips=None,
            crops=None,
            control="none",
            device=CPU,
        )
        for path in options.runs
    ]
    infos = [evaluation.info for evaluation in evaluations]
    if len({info.experiment_sha256 for info in infos}) > 1:
        raise SystemExit("the checkpoints differ in more than their seed")
    if len({info.seed for info in infos}) < len(infos):
        raise SystemExit("two checkpoints have the same seed")
    curves = study_curves(options, evaluations[0].manifest.dataset, infos[0].experiment_sha256)
    measured = [points_of(evaluation, options.thresholds, options) for evaluation in evaluations]
    least = statistics.fmean(bound for _, bound in measured)
    rows = rows_of([points for points, _ in measured])
    manifest, views = evaluations[0].manifest, evaluations[0].views
    shape = f"{views.frames}x{views.crops.size}"
    about = (
        f"{infos[0].model} {shape}, {len(infos)} seed{'s' * (len(infos) > 1)}, on {manifest.dataset}/"
        f"{manifest.split}, {len(manifest.rows)} videos"
    )
    say(about)
    draw(rows, least, curves, about, options.picture)
    bound = {"gmacs": least, "saved_pct": 100 * (1 - least / rows[0]["gmacs"])}
    rows += [{"way": f"bound, {infos[0].model} {shape}", **bound}, *map(bound_row, BOUND_OF)]
    return rows + [
        {
            "way": f"study: {cell.row}",
            "top1_pct": cell.mean,
            "gmacs": cell.gmacs,
            "top1_by_seed": [round(top1, 3) for top1 in cell.top1s.values()],
        }
        for cell in {cell.row: cell for cells in curves.values() for cell in cells}.values()
    ]


def _thresholds(text: str) -> list[float]:
    return sorted({float(word) for word in text.split(",")})


def main() -> None:
    """Measure, draw and record."""
    parser = build_parser(__doc__, repeats=7)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="one for each seed")
    parser.add_argument("--data", type=Path, required=True, help="the prepared data set")
    parser.add_argument("--split", help="default: the one of the validation")
    parser.add_argument(
        "--thresholds",
        type=_thresholds,
        default=[0.0, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0],
        help="of m, by commas; default: 0,0.01,0.03,0.1,0.3,0.6,1",
    )
    parser.add_argument("--clips", type=int, default=4, help="videos for the times")
    parser.add_argument("--batch", type=int, default=8, help="videos at a time for the scores")
    parser.add_argument("--workers", type=int, default=0, help="processes that read them")
    parser.add_argument("--picture", type=Path, default=Path("sparse-gaze.png"), metavar="PNG")
    parser.add_argument("--study", help="another curve: a study, such as tokens")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="--out of that study")
    parser.add_argument(
        "--study-data",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="all data sets of that study in its order; default: the one of --data",
    )
    options = parser.parse_args()
    if bool(options.study) != bool(options.results):
        parser.error("--study and --results go together")
    if options.study_data and not options.study:
        parser.error("--study-data is of no use without --study")
    finish("sparse_gaze", options, run(options))


if __name__ == "__main__":
    main()
