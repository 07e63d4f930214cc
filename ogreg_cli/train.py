"""``ogreg train``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ogreg_cli.common import Device, Gpus, Json, Workers, default_loader_workers
from ogreg_cli.console import Reporter, emit_json, explain, info, loading, print_table, result
from ogreg_cli.launch import launch, wants_launch
from ogreg_core.errors import DataError, Interrupted, UsageError

if TYPE_CHECKING:
    from ogreg_core.distributed import World
    from ogreg_core.recipe import LoadedRecipe
    from ogreg_core.runs import RunFolder
    from ogreg_core.training.loop import Trainer
    from ogreg_core.training.splits import Splits

EXAMPLES = (
    "Examples: ogreg train recipes/demo.toml | "
    "ogreg train recipes/folder.toml data.root=~/videos train.epochs=50 | "
    "ogreg train recipes/kinetics400.toml --gpus 8 | ogreg train recipes/kinetics400.toml --dry-run | "
    "ogreg train --resume runs/train/demo/1"
)


@dataclass(frozen=True)
class Where:
    """Where and how to run, as opposed to what is learnt."""

    device: str
    workers: int | None
    save_minutes: float
    json: bool


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
    gpus: Gpus = None,
    workers: Workers = None,
    save_minutes: Annotated[
        float,
        typer.Option(
            min=0, help="Save the state this often, and after every epoch.", metavar="MINUTES"
        ),
    ] = 10.0,
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
    print_groups: Annotated[
        bool,
        typer.Option(
            "--print-groups", help="Show every parameter's learning rate and weight decay."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Train a model by a recipe, validate it, and keep everything in a run folder."""
    flags = [] if seed is None else [f"seed={seed}"]
    if init_from is not None:
        flags.append(f"init.weights={init_from}")
    changes = list(overrides or [])
    looks = [dry_run, print_recipe, print_groups]
    asks = out or resume or (gpus and not dry_run)
    if sum(looks) > 1 or (any(looks) and asks) or (print_recipe and json):
        raise UsageError(
            "--dry-run, --print-recipe and --print-groups exclude each other, --out and --resume",
            why="they start nothing; --print-recipe has no --json, it is TOML already",
        )
    where = Where(device, workers, save_minutes, json)
    if resume is not None:
        if recipe is not None and "=" in recipe:
            changes.insert(0, recipe)
            recipe = None
        if out or flags:
            raise UsageError(
                "--resume continues a run exactly, in its own folder, from its own seed and weights",
                fix=f"ogreg train --resume {resume}, or start anew: ogreg train RECIPE --init-from {resume}",
            )
        expected = load(recipe or str(_recipe_of(resume)), changes, [])
        if wants_launch(gpus):
            raise typer.Exit(launch(gpus or 1))
        _resume(resume, expected, where)
        return
    if recipe is None:
        raise UsageError("which recipe?", fix="ogreg train recipes/demo.toml")
    loaded = load(recipe, changes, flags)
    if print_recipe:
        result(loaded.annotated().rstrip())
    elif print_groups:
        _print_groups(loaded, json)
    elif dry_run:
        _dry_run(loaded, where, gpus or 1)
    elif wants_launch(gpus):
        raise typer.Exit(launch(gpus or 1))
    else:
        _start(loaded, out, where)


def load(recipe: str, changes: list[str], flags: list[str]) -> LoadedRecipe:
    """The recipe with its overrides."""
    from ogreg_core.recipe import load_recipe

    return load_recipe(recipe, changes, flags)


def _recipe_of(folder: Path) -> Path:
    file = folder / "recipe.toml"
    if not file.is_file():
        raise DataError(f"{folder} is not a run folder", why=f"{file} does not exist")
    return file


def _start(loaded: LoadedRecipe, out: Path | None, where: Where) -> None:
    loading()
    from ogreg_core.distributed import join
    from ogreg_core.runs import RunFolder
    from ogreg_core.training.assemble import check_model
    from ogreg_core.training.settings import order_of
    from ogreg_core.training.splits import describe_run, load_splits

    with join(where.device) as (world, device):
        before = world.on_main(lambda: world.recall("run"))
        if before is not None and RunFolder(Path(before)).state.is_file():
            # torchrun has started the job anew after a process died: go on, do not begin again.
            _continue(RunFolder(Path(before)), loaded, world, device, where)
            return

        def prepare() -> None:
            RunFolder.check_free(out)
            _render_demo_if_missing(loaded)

        world.on_main(prepare)
        splits = load_splits(loaded.recipe)
        order_of(loaded.recipe, len(splits.train.rows), world)
        check_model(loaded.recipe, len(splits.train.labels))

        def create() -> RunFolder:
            run = RunFolder.create("train", loaded.name, out)
            describe_run(run, loaded, splits)
            world.remember("run", str(run.path.resolve()))
            return run

        _run(loaded, splits, world.on_main(create), world, device, where, resume=False)


def _resume(folder: Path, loaded: LoadedRecipe, where: Where) -> None:
    from dataclasses import replace

    from ogreg_core.runs import RunFolder

    run = RunFolder(folder)
    loaded = replace(loaded, name=run.read_json("data.json")["recipe"])
    loading()
    from ogreg_core.distributed import join

    with join(where.device) as (world, device):
        _continue(run, loaded, world, device, where)


def _continue(
    run: RunFolder, loaded: LoadedRecipe, world: World, device: Any, where: Where
) -> None:
    from ogreg_core.training.splits import load_splits

    moved = "data.root" in loaded.origins and loaded.origins["data.root"] == "override"
    known = None if moved else Path(run.read_json("data.json")["folder"])
    splits = load_splits(loaded.recipe, known)
    _run(loaded, splits, run, world, device, where, resume=True)


def _render_demo_if_missing(loaded: LoadedRecipe) -> None:
    data = loaded.recipe.data
    root = Path(data.root).expanduser()
    if data.dataset not in ("demo", "demo-hard") or not data.root:
        return
    hard = data.dataset == "demo-hard"
    if (root / "dataset.json").exists():
        _check_variant(root, hard)
        return
    from ogreg_core.datasets.demo import prepare_demo
    from ogreg_core.processes import default_workers

    info(f"rendering the {data.dataset} data set to {root}")
    with Reporter() as reporter:
        prepare_demo(root, hard=hard, workers=default_workers(), on_progress=reporter)


def _check_variant(root: Path, hard: bool) -> None:
    """The recipe's own root is the plain demo's: naming the harder one is not enough."""
    from ogreg_core.data.manifest import read_dataset_info

    if hard and read_dataset_info(root)["dataset"] == "demo":
        raise DataError(
            f"{root} holds the plain demo data set, not demo-hard",
            fix=f"data.root={shlex.quote(f'{root}-hard')}: rendered if it is not there",
        )


def _run(
    loaded: LoadedRecipe,
    splits: Splits,
    run: RunFolder,
    world: World,
    device: Any,
    where: Where,
    *,
    resume: bool,
) -> None:
    from ogreg_core.training.assemble import build_trainer

    count = default_loader_workers() if where.workers is None else where.workers
    owned: list[Any] = []
    # Two processes that train in one folder would ruin it for both.
    world.on_main(lambda: owned.append(run.own()))
    log = None
    # A run that cannot be continued is left as it is.
    began = not resume
    try:
        with Reporter() as reporter:
            info(
                f"run {run.path}: {loaded.recipe.model.name} on {device}, {len(splits.train.rows)} training videos"
            )
            trainer = build_trainer(
                loaded,
                splits,
                run,
                device=device,
                workers=count,
                on_progress=reporter,
                world=world,
                save_seconds=60 * where.save_minutes,
                starting_weights=not resume,
            )
            if resume:
                trainer.resume()
            began = True
            log = run.open_log() if world.is_main else None
            _announce(loaded, splits, trainer, world)
            if world.is_main:
                run.note_command()
                run.status("running", 0, resume=_resume_command(run))
            trainer.fit()
    except BaseException as error:
        if world.is_main and began:
            _note_failure(run, error)
        raise
    finally:
        for file in (log, *owned):
            if file is not None:
                file.close()
    if world.is_main:
        run.status("done", 0)
        _report(loaded, splits, run, trainer, where.json)


def _announce(loaded: LoadedRecipe, splits: Splits, trainer: Trainer, world: World) -> None:
    """Who takes part, what a step consists of, and what the first checks found."""
    import socket

    from ogreg_core.training.announcement import describe_step
    from ogreg_core.training.preflight import quick_checks

    if world.size > 1:
        hosts = sorted(set(world.gather(socket.gethostname())))
        info(f"{world.size} processes on {', '.join(hosts)}")
    for sentence in describe_step(loaded.recipe, trainer.order):
        info(sentence)
    for sentence in world.on_main(lambda: quick_checks(loaded.recipe, splits, trainer.run.path)):
        info(f"note: {sentence}")
    if trainer.resumed:
        info(f"continuing after epoch {trainer.position.epoch}, step {trainer.position.step}")


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
    loaded: LoadedRecipe, splits: Splits, run: RunFolder, trainer: Trainer, json: bool
) -> None:
    from ogreg_core.curves_picture import save_curves

    position, found = trainer.position, trainer.validation
    assert found is not None
    metrics = found.metrics
    document = {
        "schema": "ogreg.train.v1",
        "run": run.path,
        "model": loaded.recipe.model.name,
        "seed": loaded.recipe.seed,
        "processes": trainer.world.size,
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
    curves = run.path / "curves.png"
    save_curves(run.path / "metrics.jsonl", curves, f"{loaded.name}, {loaded.recipe.model.name}")
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
    result(f"curves: {curves}")
    folder, video = (
        shlex.quote(str(run.path)),
        shlex.quote(str(splits.val.video(splits.val.rows[0]))),
    )
    info("try next:")
    info(f"  ogreg eval {folder} --frame-order shuffled   # how much needs the order of frames")
    info(f"  ogreg predict {video} -c {folder}")
    info(f"  ogreg visualize-gaze {video} -c {folder}")
    info(f"  ogreg profile -c {folder}")


def _videos(metrics: Any, splits: Splits) -> str:
    text = str(metrics.videos)
    if metrics.unreadable:
        text += f", {metrics.unreadable} unreadable"
    return f"{text} of {splits.val.annotated} annotated" if splits.val.annotated else text


def _print_groups(loaded: LoadedRecipe, json: bool) -> None:
    loading()
    from ogreg_core.training.announcement import parameter_table

    rows = parameter_table(loaded.recipe)
    if json:
        emit_json({"schema": "ogreg.groups.v1", "recipe": loaded.name, "parameters": rows})
        return
    print_table(
        f"Parameters of {loaded.recipe.model.name}",
        ["parameter", "shape", "group", "peak lr", "weight decay"],
        [
            [
                row["name"],
                "x".join(map(str, row["shape"])),
                row["group"],
                f"{row['lr']:.3g}",
                f"{row['weight_decay']:g}",
            ]
            for row in rows
        ],
        right=(3, 4),
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def _dry_run(loaded: LoadedRecipe, where: Where, processes: int) -> None:
    loading()
    from ogreg_core.devices import pick_device
    from ogreg_core.training.preflight import check_recipe

    count = default_loader_workers() if where.workers is None else where.workers
    device = pick_device(where.device)
    found = check_recipe(loaded, device, workers=count, processes=processes)
    if where.json:
        emit_json(
            {
                "schema": "ogreg.dry-run.v1",
                "recipe": loaded.name,
                "figures": found.figures,
                "missing": found.missing,
                "problems": found.problems,
                "notes": found.notes,
            }
        )
        raise typer.Exit(bool(found.problems))
    rows = [[name.replace("_", " "), _shown(value)] for name, value in found.figures.items()]
    print_table(f"Dry run of {loaded.name}", ["check", "figure"], rows, right=(1,))
    for kind, sentences in (
        ("missing", found.missing),
        ("note", found.notes),
        ("problem", found.problems),
    ):
        for text in sentences:
            result(f"{kind}: {text}")
    result("nothing was trained or written")
    raise typer.Exit(bool(found.problems))
