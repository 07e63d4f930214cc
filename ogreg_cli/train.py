"""``ogreg train``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Device, Json, Workers, default_loader_workers
from ogreg_cli.console import Reporter, emit_json, explain, info, loading, print_table, result
from ogreg_core.errors import DataError, Interrupted, UsageError

if TYPE_CHECKING:
    from ogreg_core.recipe import LoadedRecipe
    from ogreg_core.runs import RunFolder
    from ogreg_core.training.assemble import Splits

EXAMPLES = (
    "Examples: ogreg train recipes/demo.toml | "
    "ogreg train recipes/folder.toml data.root=~/videos train.epochs=50 | "
    "ogreg train recipes/kinetics400.toml --dry-run | ogreg train --resume runs/train/demo/1"
)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="TOML file, or the name of a built-in recipe.", metavar="RECIPE"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Recipe keys to change, TOML values.", metavar="KEY=VALUE"),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder, exactly.", metavar="RUN")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Start a new run from these weights: a file, or swin_t, swin3d_t ...",
            metavar="WEIGHTS",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder instead of runs/train/RECIPE/N.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same as the override seed=N.")] = None,
    device: Device = "auto",
    workers: Workers = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build and check everything, train nothing, write nothing."),
    ] = False,
    print_recipe: Annotated[
        bool,
        typer.Option(
            "--print-recipe", help="Show the resolved recipe with the origin of each value."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train a model by a recipe, validate it, and keep everything in a run folder."""
    flags = [] if seed is None else [f"seed={seed}"]
    if init_from is not None:
        flags.append(f"init.weights={init_from}")
    changes = list(overrides or [])
    if resume is not None:
        if recipe or flags or changes or out or dry_run or print_recipe:
            raise UsageError(
                "--resume continues a run exactly and takes no recipe, override or other start option",
                fix=f"ogreg train --resume {resume}, or start anew: ogreg train RECIPE --init-from {resume}",
            )
        _resume(resume, device, workers, json)
        return
    if recipe is None:
        raise UsageError("which recipe?", fix="ogreg train recipes/demo.toml")
    from ogreg_core.recipe import load_recipe

    if (print_recipe and (dry_run or json)) or ((print_recipe or dry_run) and out):
        raise UsageError(
            "--print-recipe, --dry-run and --out exclude each other, so do --print-recipe and --json"
        )
    loaded = load_recipe(recipe, changes, flags)
    if print_recipe:
        result(loaded.annotated().rstrip())
    elif dry_run:
        _dry_run(loaded, device, json)
    else:
        _start(loaded, out, device, workers, json)


def _start(
    loaded: LoadedRecipe, out: Path | None, device: str, workers: int | None, json: bool
) -> None:
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.runs import RunFolder
    from ogreg_core.training.assemble import describe_run, load_splits

    chosen = pick_device(device)
    RunFolder.check_free(out)
    _render_demo_if_missing(loaded)
    splits = load_splits(loaded.recipe)
    run = RunFolder.create("train", loaded.name, out)
    describe_run(run, loaded, splits)
    _run(loaded, splits, run, chosen, workers, json, resume=False)


def _resume(folder: Path, device: str, workers: int | None, json: bool) -> None:
    from ogreg_core.recipe import load_recipe
    from ogreg_core.runs import RunFolder

    file = folder / "recipe.toml"
    if not file.is_file():
        raise DataError(f"{folder} is not a run folder", why=f"{file} does not exist")
    loaded = load_recipe(str(file))
    run = RunFolder(folder)
    data = run.read_json("data.json")
    loaded = replace(loaded, name=data["recipe"])
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.training.assemble import check_same_data, load_splits

    splits = load_splits(loaded.recipe, Path(data["folder"]))
    check_same_data(run, splits)
    _run(loaded, splits, run, pick_device(device), workers, json, resume=True)


def _render_demo_if_missing(loaded: LoadedRecipe) -> None:
    data = loaded.recipe.data
    root = Path(data.root).expanduser()
    if data.dataset != "demo" or not data.root or (root / "dataset.json").exists():
        return
    from ogreg_core.datasets.demo import prepare_demo
    from ogreg_core.processes import default_workers

    info(f"rendering the demo data set to {root}")
    with Reporter() as reporter:
        prepare_demo(root, workers=default_workers(), on_progress=reporter)


def _run(
    loaded: LoadedRecipe,
    splits: Splits,
    run: RunFolder,
    device: Any,
    workers: int | None,
    json: bool,
    *,
    resume: bool,
) -> None:
    from ogreg_core.training.assemble import build_trainer

    count = default_loader_workers() if workers is None else workers
    log = run.open_log()
    try:
        with Reporter() as reporter:
            info(
                f"run {run.path}: {loaded.recipe.model.name} on {device}, {len(splits.train.rows)} training videos"
            )
            trainer = build_trainer(
                loaded, splits, run, device=device, workers=count, on_progress=reporter
            )
            if resume:
                trainer.resume()
                info(
                    f"continuing after epoch {trainer.position.epoch}, step {trainer.position.step}"
                )
            run.note_command()
            run.status("running", 0, resume=_resume_command(run))
            position = trainer.fit()
    except BaseException as error:
        _note_failure(run, error)
        raise
    finally:
        log.close()
    run.status("done", 0)
    _report(loaded, splits, run, position, trainer.metrics, json)


def _note_failure(run: RunFolder, error: BaseException) -> None:
    """Leave the reason in the run folder; launchers swallow exit codes and terminals scroll away."""
    import logging

    logging.getLogger("ogreg").error("run ended", exc_info=error)
    known = explain(error)
    state = "interrupted" if isinstance(known, Interrupted) else "failed"
    resume = _resume_command(run) if run.state.is_file() else ""
    run.status(state, known.exit_code, known.what, resume)


def _resume_command(run: RunFolder) -> str:
    return f"ogreg train --resume {shlex.quote(str(run.path))}"


def _report(
    loaded: LoadedRecipe, splits: Splits, run: RunFolder, position: Any, metrics: Any, json: bool
) -> None:
    document = {
        "schema": "ogreg.train.v1",
        "run": run.path,
        "model": loaded.recipe.model.name,
        "epochs": position.epoch,
        "train_seconds": round(position.seconds, 1),
        "best_top1_pct": position.best_top1,
        "best_epoch": position.best_epoch,
        "last_top1_pct": metrics.top1,
        "last_top5_pct": metrics.top5,
        "val_videos": metrics.videos,
        "val_unreadable": metrics.unreadable,
        "val_annotated": splits.val.annotated or None,
    }
    run.write_json("report.json", {**document, "run": str(run.path)})
    if json:
        emit_json(document)
        return
    print_table(
        "Training finished",
        ["model", "epochs", "training time", "best top-1", "last top-1", "last top-5", "videos"],
        [
            [
                loaded.recipe.model.name,
                str(position.epoch),
                f"{position.seconds:.0f} s",
                f"{position.best_top1:.1f} % (epoch {position.best_epoch})",
                f"{metrics.top1:.1f} %",
                f"{metrics.top5:.1f} %",
                _videos(metrics, splits),
            ]
        ],
        right=(1, 2, 3, 4, 5, 6),
    )
    result(f"checkpoint: {run.best}")
    folder, video = (
        shlex.quote(str(run.path)),
        shlex.quote(str(splits.val.video(splits.val.rows[0]))),
    )
    info("try next:")
    info(f"  ogreg eval {folder} --frame-order shuffled   # how much needs the order of frames")
    info(f"  ogreg predict {video} -c {folder}")
    info(f"  ogreg visualize-gaze {video} -c {folder}")
    info(f"  ogreg profile --model {loaded.recipe.model.name}")


def _videos(metrics: Any, splits: Splits) -> str:
    text = str(metrics.videos)
    if metrics.unreadable:
        text += f", {metrics.unreadable} unreadable"
    return f"{text} of {splits.val.annotated} annotated" if splits.val.annotated else text


def _dry_run(loaded: LoadedRecipe, device: str, json: bool) -> None:
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.training.preflight import check_recipe

    found = check_recipe(loaded, pick_device(device))
    if json:
        emit_json(
            {
                "schema": "ogreg.dry-run.v1",
                "recipe": loaded.name,
                **found.figures,
                "missing": found.missing,
            }
        )
        return
    rows = [
        [name, f"{value:,.1f}" if isinstance(value, float) else str(value)]
        for name, value in found.figures.items()
    ]
    print_table(f"Dry run of {loaded.name}", ["check", "figure"], rows, right=(1,))
    for text in found.missing:
        result(f"missing: {text}")
    result("nothing was trained or written")
