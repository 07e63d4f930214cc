"""``ogreg visualize-gaze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ogreg_cli.common import Checkpoint, Device, Json, choose_checkpoint
from ogreg_cli.console import emit_json, info, loading, result

EXAMPLES = (
    "Examples: ogreg visualize-gaze clip.mp4 | ogreg visualize-gaze clip.mp4 --blocks stage1 --blocks stage2.block1 "
    "-o gaze/ -c runs/train/demo/1"
)


def visualize_gaze(
    video: Annotated[str, typer.Argument(help="Video file.", metavar="VIDEO")],
    checkpoint: Checkpoint = None,
    blocks: Annotated[
        list[str] | None,
        typer.Option(help="Stage or block to look at, e.g. stage2; repeatable.", metavar="NAME"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder instead of runs/visualize-gaze/CLIP/N."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw what the model looks at: an overlay video, and a sheet with gaze, glance, d[t] and m[t]."""
    path, origin = choose_checkpoint(checkpoint)
    loading()
    from ogreg_core import gaze
    from ogreg_core.devices import pick_device
    from ogreg_core.inference import Predictor
    from ogreg_core.runs import RunFolder

    RunFolder.check_free(out)
    predictor = Predictor.from_checkpoint(path, pick_device(device))
    info(f"weights: {path} ({origin})")
    found = gaze.look(predictor, video, blocks or ())
    meanings = gaze.meanings_of(predictor.info, found)
    for kind, meaning in meanings.items():
        info(f"{kind}: {meaning}")
    stem = Path(video).stem
    folder = RunFolder.create("visualize-gaze", stem, out).path
    sheet, overlay = folder / f"{stem}_gaze.png", folder / f"{stem}_gaze.mp4"
    gaze.save_sheet(found, sheet, f"{Path(video).name}, {predictor.info.model}")
    gaze.save_overlay_video(found, overlay)
    if json:
        emit_json(
            {
                "schema": "ogreg.gaze.v1",
                "path": str(Path(video).resolve()),
                "sheet": sheet.resolve(),
                "overlay": overlay.resolve(),
                "label": found.label,
                "score": found.score,
                "still": found.still,
                "maps": meanings,
                "frame_indices": found.indices,
                "profiles": {
                    name: {curve: values.tolist() for curve, values in curves.items()}
                    for name, curves in found.profiles.items()
                },
            }
        )
        return
    if found.still:
        info("the frames are all alike: the gaze map is flat")
    result(f"{found.label}\t{100 * found.score:.1f} %")
    result(f"sheet: {sheet}")
    result(f"overlay: {overlay}")
