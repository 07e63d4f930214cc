"""``ogreg data``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ogreg_cli.common import Json
from ogreg_cli.console import emit_json, info, loading, result
from ogreg_core.errors import UsageError

EXAMPLES = (
    "Examples: ogreg data show recipes/demo.toml | "
    "ogreg data show demo augment.mixup=0.4 augment.erasing=0.5 --epoch 3 | "
    "ogreg data show demo eval.clips=2 eval.crops=3 --samples 0 --views 4 --out views.png"
)


def show(
    recipe: Annotated[
        str, typer.Argument(help="TOML file, or the name of a built-in recipe.", metavar="RECIPE")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Recipe keys to change, TOML values.", metavar="KEY=VALUE"),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=64, help="Training videos, in the order of the epoch.")
    ] = 4,
    views: Annotated[
        int, typer.Option(min=0, max=16, help="Test videos, spread over their split.")
    ] = 2,
    epoch: Annotated[int, typer.Option(min=1, help="Epoch as `ogreg train` counts.")] = 1,
    index: Annotated[
        list[int] | None,
        typer.Option(
            help="Row of the training split, from 0, instead of the epoch's first; repeatable."
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the test views; same as data.val_split=SPLIT.", metavar="SPLIT"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="PNG file instead of runs/data/RECIPE/N/samples.png."),
    ] = None,
    json: Json = False,
) -> None:
    """Draw training samples as the model gets them, and test views, with labels and timings."""
    from ogreg_core.recipe import load_recipe

    if not (samples or index or views):
        raise UsageError("--samples 0 --views 0 leaves nothing to show")
    _check_out(out)
    flags = [] if split is None else [f"data.val_split={split}"]
    loaded = load_recipe(recipe, overrides or [], flags)
    loading()
    from ogreg_core.data_picture import save_sheet
    from ogreg_core.data_show import collect
    from ogreg_core.files import write_text_atomic
    from ogreg_core.runs import RunFolder

    found = collect(loaded, samples=samples, videos=views, epoch=epoch - 1, indices=index or ())
    path = out
    if path is None:
        run = RunFolder.create("data", loaded.name)
        path = run.path / "samples.png"
        run.note_command()
        write_text_atomic(run.path / "recipe.toml", loaded.recipe.to_toml())
        run.write_json("samples.json", found.to_json())
    save_sheet(found, path)
    for video in found.unreadable:
        info(f"not shown: {video.reason}")
    if found.samples:
        info(
            f"decode {found.decode_ms:.1f} ms, augment {found.augment_ms:.1f} ms per clip "
            f"(median of {len(found.samples)}, one thread)"
        )
    if json:
        emit_json({**found.to_json(), "picture": path.resolve()})
    else:
        result(str(path))


def _check_out(out: Path | None) -> None:
    """Refuse a file that cannot or must not be written, before any work is done."""
    if out is None:
        return
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out} is no .png file", why="the picture is a PNG")
    if out.exists():
        raise UsageError(f"{out} exists", fix="choose another --out")
    if not out.parent.is_dir():
        raise UsageError(
            f"the folder {out.parent} does not exist",
            fix=f"mkdir -p {shlex.quote(str(out.parent))}",
        )
