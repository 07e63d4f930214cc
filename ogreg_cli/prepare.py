"""``ogreg prepare``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ogreg_cli.common import Json
from ogreg_cli.console import Reporter, emit_json, info, loading, print_table, result, settings
from ogreg_core.errors import UsageError

EXAMPLES = (
    "Examples: ogreg prepare demo data/demo | ogreg prepare folder ~/videos | "
    "ogreg prepare folder /data/read-only --out data/mine --val-share 0.1"
)
DATASETS = ("demo", "folder")


def prepare(
    dataset: Annotated[
        str, typer.Argument(help=f"Which data set: {', '.join(DATASETS)}.", metavar="DATASET")
    ],
    root: Annotated[
        Path, typer.Argument(help="Where its videos lie, or (demo) shall lie.", metavar="ROOT")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the manifest.  [folder; default: ROOT]")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name to remember it by.  [folder; default: ROOT's]")
    ] = None,
    val_share: Annotated[
        float | None,
        typer.Option(min=0.0, max=0.9, help="Share of each class to validate on.  [folder; 0.2]"),
    ] = None,
    train_clips: Annotated[
        int | None, typer.Option(min=1, help="Training clips per class.  [demo; 24]")
    ] = None,
    val_clips: Annotated[
        int | None, typer.Option(min=1, help="Validation clips per class.  [demo; 8]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, or of the rendered scenes.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; default: one per core.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a data set ready: find its videos, check each, write the manifest. Videos are never
    changed.
    """
    from ogreg_core.models.registry import nearest

    if dataset not in DATASETS:
        hint = nearest(dataset, DATASETS) or f"data sets: {', '.join(DATASETS)}"
        raise UsageError(f"there is no data set {dataset!r}", why=hint, fix="ogreg prepare --help")
    foreign: dict[str, dict[str, object]] = {
        "demo": {"--out": out, "--name": name, "--val-share": val_share},
        "folder": {"--train-clips": train_clips, "--val-clips": val_clips},
    }
    if unusable := [option for option, value in foreign[dataset].items() if value is not None]:
        raise UsageError(
            f"{', '.join(unusable)} cannot be used with {dataset}", fix="ogreg prepare --help"
        )
    loading()
    from ogreg_core.datasets.common import default_workers

    workers = default_workers() if workers is None else workers
    with Reporter() as reporter:
        if dataset == "demo":
            from ogreg_core.datasets.demo import prepare_demo

            report = prepare_demo(
                root,
                train_per_class=train_clips or 24,
                val_per_class=val_clips or 8,
                seed=seed,
                workers=workers,
                on_progress=reporter,
            )
        else:
            from ogreg_core.datasets.folder import prepare_folder

            report = prepare_folder(
                root,
                out=out,
                name=name,
                val_share=0.2 if val_share is None else val_share,
                seed=seed,
                workers=workers,
                on_progress=reporter,
            )
    if json:
        emit_json(
            {
                "schema": "ogreg.prepare.v1",
                "dataset": report.dataset,
                "folder": report.folder,
                "classes": len(report.classes),
                "videos": report.videos,
                "quarantined": [vars(item) for item in report.quarantined],
            }
        )
        return
    rows = [[split, str(count)] for split, count in report.videos.items()]
    print_table(
        f"{report.dataset}: {len(report.classes)} classes", ["split", "videos"], rows, right=(1,)
    )
    result(f"manifest: {report.folder}")
    if report.quarantined:
        info(f"{len(report.quarantined)} files left out, see {report.folder / 'quarantine.csv'}")
        for item in report.quarantined[: None if settings.verbose else 3]:
            info(f"  {item.code}: {item.detail}")
    recipe = "demo" if dataset == "demo" else "folder"
    info(f"next: ogreg train recipes/{recipe}.toml data.root={shlex.quote(str(report.folder))}")
