"""``ogreg prepare``."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Json
from ogreg_cli.console import Reporter, emit_json, info, loading, print_table, result, settings
from ogreg_core.datasets.catalogue import (
    CATALOGUE,
    list_dataset,
    parse_shard,
    shard_of_environment,
)
from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    from ogreg_core.datasets.listing import LeftOut
    from ogreg_core.datasets.prepare import PrepareReport

EXAMPLES = (
    "Examples: ogreg prepare kinetics400 /data/k400 | "
    "ogreg prepare ssv2 /data/ssv2 --annotations /data/ssv2/labels --resize 256 --out /fast/ssv2 | "
    "ogreg prepare folder ~/videos --val-share 0.1 | ogreg prepare kinetics400 /data/k400 --shard 2/8 | "
    "ogreg prepare kinetics400 /data/k400 --merge | ogreg prepare imagenet1k /data/imagenet | "
    "ogreg prepare imagefolder ~/photos | ogreg prepare demo data/demo | "
    "ogreg prepare demo data/demo-hard --hard"
)
DATASETS = (*CATALOGUE, "demo")


class Verify(str, Enum):
    """How much of each file is decoded."""

    quick = "quick"
    full = "full"


def prepare(
    dataset: Annotated[
        str, typer.Argument(help=f"Which data set: {', '.join(DATASETS)}.", metavar="DATASET")
    ],
    root: Annotated[
        Path, typer.Argument(help="Where its videos lie, or (demo) shall lie.", metavar="ROOT")
    ],
    annotations: Annotated[
        Path | None,
        typer.Option(help="Folder of the annotation files or lists; default: found below ROOT."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the manifest and copies; default: ROOT, or a folder in it if that has such files.",
        ),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            min=32, help="Re-encode to this short side, pixels (256, 320): faster to read."
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(min=0.1, help="With --resize: constant frame rate; default: times are kept."),
    ] = None,
    verify: Annotated[
        Verify,
        typer.Option(help="quick: decode first, middle and last frame of each file; full: all."),
    ] = Verify.quick,
    shard: Annotated[
        str | None,
        typer.Option(help="Check only part i of n, e.g. 2/8; also taken from torchrun and srun."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the manifest from all finished shards.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(help="Name to remember it by.  [folder, list, imagefolder; default: ROOT's]"),
    ] = None,
    val_share: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.9,
            help="Share to validate on.  [folder, imagefolder, of each class: 0.2; diving48, whole source videos: 0]",
        ),
    ] = None,
    fold: Annotated[
        int | None, typer.Option(min=1, max=3, help="Official split.  [ucf101, hmdb51; 1]")
    ] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Take paths that lead out of ROOT.  [list]")
    ] = False,
    train_clips: Annotated[
        int | None, typer.Option(min=1, help="Training clips per class.  [demo; 24]")
    ] = None,
    val_clips: Annotated[
        int | None, typer.Option(min=1, help="Validation clips per class.  [demo; 8]")
    ] = None,
    hard: Annotated[
        bool,
        typer.Option(
            "--hard", help="More motions, distractors, a camera that moves: demo-hard.  [demo]"
        ),
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of the split, or of the rendered scenes.  [folder, imagefolder, diving48, demo; 0]",
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            min=1.0,
            help="Seconds for one file, more for large ones that are decoded whole.  [60]",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; default: one per core; 0: unprotected.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a data set ready: match annotations and files, check each file, write the manifest. Your
    videos are never changed.
    """
    from ogreg_core.models.registry import nearest

    if dataset not in DATASETS:
        hint = nearest(dataset, DATASETS) or f"data sets: {', '.join(DATASETS)}"
        raise UsageError(f"there is no data set {dataset!r}", why=hint, fix="ogreg prepare --help")
    if resize and dataset in CATALOGUE and CATALOGUE[dataset].images:
        raise UsageError(
            f"--resize cannot be used with {dataset}", why="it re-encodes videos, not images"
        )
    if fps and not resize:
        raise UsageError("--fps needs --resize", why="only re-encoded copies can change their rate")
    if resize and resize % 2:
        raise UsageError(f"--resize {resize} is odd", why="H.264 needs even sides")
    if merge and (shard or deadline or workers is not None):
        raise UsageError("--merge checks no file and excludes --shard, --deadline and --workers")
    part = parse_shard(shard) if shard else (None if merge else shard_of_environment())
    from ogreg_core.processes import default_workers

    processes = default_workers() if workers is None else workers
    of_demo = {"--train-clips": train_clips, "--val-clips": val_clips, "--hard": hard or None}
    if dataset == "demo":
        others = {
            "--annotations": annotations,
            "--out": out,
            "--resize": resize,
            "--name": name,
            "--val-share": val_share,
            "--fold": fold,
            "--allow-outside": allow_outside or None,
            "--shard": shard,
            "--merge": merge or None,
            "--verify": "full" if verify is Verify.full else None,
            "--deadline": deadline,
        }
        _refuse(others, dataset)
        report = _prepare_demo(root, hard, train_clips or 24, val_clips or 8, seed or 0, processes)
    else:
        _refuse(of_demo, dataset)
        report = _prepare(
            dataset,
            root,
            annotations,
            {
                "name": name,
                "val_share": val_share,
                "fold": fold,
                "allow_outside": allow_outside or None,
                "seed": seed,
            },
            {
                "out": out,
                "verify": verify.value,
                "workers": processes,
                "deadline": deadline or 60.0,
                "shard": part,
                "merge": merge,
            },
            resize,
            fps,
        )
    if json:
        emit_json(_document(report))
    else:
        _render(report, dataset)


def _refuse(options: dict[str, Any], dataset: str) -> None:
    if unusable := [option for option, value in options.items() if value is not None]:
        raise UsageError(
            f"{', '.join(unusable)} cannot be used with {dataset}", fix="ogreg prepare --help"
        )


def _prepare_demo(
    root: Path, hard: bool, train_clips: int, val_clips: int, seed: int, workers: int
) -> PrepareReport:
    from ogreg_core.datasets.demo import prepare_demo

    with Reporter() as reporter:
        return prepare_demo(
            root,
            hard=hard,
            train_per_class=train_clips,
            val_per_class=val_clips,
            seed=seed,
            workers=workers,
            command=_command(),
            on_progress=reporter,
        )


def _prepare(
    dataset: str,
    root: Path,
    annotations: Path | None,
    listing_options: dict[str, Any],
    options: dict[str, Any],
    resize: int | None,
    fps: float | None,
) -> PrepareReport:
    from ogreg_core.datasets.prepare import PrepareOptions, prepare_listing

    settings_of_copies = None
    if resize:
        loading()
        from ogreg_core.video.transcode import TranscodeSettings

        settings_of_copies = TranscodeSettings(short_side=resize, fps=fps or 0.0)
    root = root.expanduser().resolve()
    annotations = annotations.expanduser().resolve() if annotations else None
    listing = list_dataset(dataset, root, annotations, **listing_options)
    command = _command()
    if not options["merge"]:
        found, annotated = len(listing.entries), sum(listing.annotated.values())
        kind = "images" if CATALOGUE[dataset].images else "videos"
        info(f"{dataset}: {found:,} of {annotated:,} {kind} found, {len(listing.labels)} classes")
    with Reporter() as reporter:
        prepared = PrepareOptions(**options, resize=settings_of_copies, command=command)
        return prepare_listing(listing, prepared, reporter)


def _command() -> str:
    """This command line without its share of the work, so that it can be run again as printed."""
    import sys

    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word == "--shard":
            next(words, None)
        elif word != "--merge" and not word.startswith("--shard="):
            kept.append(shlex.quote(word))
    return " ".join(["ogreg", *kept])


def _document(report: PrepareReport) -> dict[str, Any]:
    return {
        "schema": "ogreg.prepare.v2",
        "dataset": report.dataset,
        "folder": report.folder,
        "shard": None if report.shard is None else "{}/{}".format(*report.shard),
        "classes": len(report.classes),
        "videos": report.videos,
        "coverage": report.coverage,
        "left_out": report.reasons(),
        "extra": len(report.extra),
        "notes": report.notes,
        "checked_files": report.checked,
        "seconds": round(report.seconds, 2),
        "originals_bytes": report.originals_bytes,
        "copies_bytes": report.copies_bytes,
        "read_speedup": report.read_speedup,
        "quarantined": [_left_out(item) for item in report.left_out],
    }


def _left_out(item: LeftOut) -> dict[str, str]:
    return {"path": item.path, "split": item.split, "code": item.code, "detail": item.detail}


def _render(report: PrepareReport, dataset: str) -> None:
    from ogreg_core.datasets.prepare import REASONS

    each = f", {1000 * report.seconds / report.checked:.1f} ms each" if report.checked else ""
    info(f"{report.checked:,} files checked in {report.seconds:.1f} s{each}")
    if report.shard:
        number, count = report.shard
        result(f"shard {number}/{count} is complete: {report.folder}")
        info(f"when all {count} are: {_command()} --merge")
        return
    rows = [
        [
            split,
            f"{counts['annotated']:,}",
            f"{counts['found']:,}",
            f"{counts['videos']:,}",
            f"{100 * counts['videos'] / counts['annotated']:.1f} %" if counts["annotated"] else "",
        ]
        for split, counts in report.coverage.items()
    ]
    print_table(
        f"{report.dataset}: {len(report.classes)} classes",
        ["split", "annotated", "found", "usable", "coverage"],
        rows,
        right=(1, 2, 3, 4),
    )
    for note in report.notes:
        info(f"note: {note}")
    if report.copies_bytes:
        _render_copies(report)
    result(f"manifest: {report.folder}")
    if report.extra:
        info(f"{len(report.extra):,} files that no annotation names: {report.folder / 'extra.txt'}")
    if report.left_out:
        counts = ", ".join(f"{code} {count:,}" for code, count in report.reasons().items())
        info(f"{len(report.left_out):,} left out ({counts}): {report.folder / 'quarantine.csv'}")
        if settings.verbose:
            for item in report.left_out:
                info(f"  {item.code}: {item.path}: {item.detail}")
        else:
            for code in report.reasons():
                info(f"  {code}: {REASONS[code]}")
    info(f"overview: {report.folder / 'overview.png'}")
    recipe = "demo" if dataset == "demo" else CATALOGUE[dataset].recipe
    other = "data.dataset=demo-hard " if report.dataset == "demo-hard" else ""
    folder = shlex.quote(str(report.folder))
    info(f"next: ogreg train recipes/{recipe}.toml {other}data.root={folder}")


def _render_copies(report: PrepareReport) -> None:
    share = 100 * report.copies_bytes / report.originals_bytes
    text = (
        f"copies: {report.copies_bytes / 1e6:,.1f} MB, {share:.0f} % of the originals' "
        f"{report.originals_bytes / 1e6:,.1f} MB"
    )
    if report.read_speedup:
        text += f"; a training clip is read {report.read_speedup:.1f} times as fast"
    result(text)
