"""Checkpoints as programs that need no ogreg: torch.export archives (``.pt2``) and ONNX (``.onnx``).

A program takes frames as a decoder gives them, already resized and cropped, and gives scores:
normalisation and softmax are inside. For those who have that already it takes normalised clips and gives
logits. What it computed is compared with the model, out of the written file, before the file gets its
name.

Each file holds one JSON document, under the name ``ogreg.json`` (an extra file of the archive, a key of
ONNX's ``metadata_props``)::

    schema      "ogreg.exported.v1"
    ogreg       version that exported; torch: version of torch
    format      "torch" or "onnx"
    input       name; dtype; layout, the axes by letter; shape, null where any number will do;
                colours "RGB"; range of the values, null if they are normalised; normalised
    output      name, "scores" (softmax) or "logits"; dtype; shape
    resize      how frames get the checkpoint's short_side; the crops are cut out of them
    views       clips and crops per video, and how their scores are put together
    weights     sha256 of the checkpoint file, number of parameters, licence (null: not stated)
    checkpoint  what the checkpoint says about itself: model, options, labels by index, sampling, size,
                short_side, mean, std, data set, recipe, metrics, ...; see
                :class:`ogreg_core.checkpoint.CheckpointInfo`. Without the place of the training data.

Notation: B batch, T frames, S side of the crop in pixels.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ogreg_core import __version__
from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.transforms import to_input
from ogreg_core.datasets.demo import FPS, render_clip
from ogreg_core.errors import CheckpointError, OgregError, UsageError, WorkFailed, is_out_of_memory
from ogreg_core.evaluation import score_views
from ogreg_core.export_formats import FORMATS, Run, format_of, require_packages
from ogreg_core.files import write_atomic
from ogreg_core.inference import read_views
from ogreg_core.models.protocol import takes_times
from ogreg_core.progress import Note, ProgressCallback
from ogreg_core.video import write_video

__all__ = [
    "TOLERANCE",
    "Agreement",
    "Choice",
    "Exported",
    "Traced",
    "read_exported",
    "test_clips",
    "trace_checkpoint",
]

TOLERANCE = 1e-4
"""How far logits may move, as a share of their range; see :func:`_agreement`."""

# What float32 leaves of the logarithm of a score, whatever the range.
_ROUNDING = 2e-6
# Scores below are 0 to one side or the other.
_LEAST_SCORE = 1e-30
_SCHEMA = "ogreg.exported.v1"
_DYNAMIC_BATCHES = (1, 3)


@dataclass(frozen=True)
class Choice:
    """What is exported.

    Args:
        format: ``torch`` or ``onnx``.
        input: ``frames``, uint8 ``[B, T, S, S, 3]`` to scores; or ``clip``, float32, normalised,
            ``[B, 3, T, S, S]`` to logits.
        batch: clips at a time; None for any number.
        licence: of the weights, in words; empty if nobody says.
    """

    format: Literal["torch", "onnx"] = "torch"
    input: Literal["frames", "clip"] = "frames"
    batch: int | None = None
    licence: str = ""

    @property
    def names(self) -> tuple[str, str]:
        """Names of input and output."""
        return self.input, "scores" if self.input == "frames" else "logits"


@dataclass(frozen=True)
class Agreement:
    """A file beside its model, on one batch.

    Args:
        batch: number of clips.
        difference: the largest of any logit (of scores: of their logarithms).
        range: from the least to the largest logit of a clip, at most.
        allowed: what ``difference`` may be.
    """

    batch: int
    difference: float
    range: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether they agree; not if something is not a number."""
        return self.difference <= self.allowed


class _FromFrames(nn.Module):
    """uint8 ``[B, T, S, S, 3]`` to scores, float32 ``[B, classes]``."""

    def __init__(self, model: nn.Module, info: CheckpointInfo) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = info.mean, info.std

    def forward(self, frames: Tensor) -> Tensor:
        clip = to_input(rearrange(frames, "b t h w c -> b c t h w"), self.mean, self.std)
        scores: Tensor = self.model(clip).softmax(dim=-1)
        return scores


@dataclass(frozen=True)
class Traced:
    """A checkpoint that has become a program and waits to be written.

    Args:
        checkpoint: the file.
        model: on the CPU, float32.
        info: what the checkpoint says about itself.
        choice: what is exported.
        program: of torch.export.
        seconds: that the tracing took.
    """

    checkpoint: Path
    model: nn.Module
    info: CheckpointInfo
    choice: Choice
    program: ExportedProgram
    seconds: float

    def document(self) -> dict[str, Any]:
        """What stands in the file."""
        info, choice = self.info, self.choice
        of_frames = choice.input == "frames"
        side, frames = info.size, info.sampling.frames
        return {
            "schema": _SCHEMA,
            "ogreg": __version__,
            "torch": str(torch.__version__),
            "format": choice.format,
            "input": {
                "name": choice.names[0],
                "dtype": "uint8" if of_frames else "float32",
                "layout": "BTHWC" if of_frames else "BCTHW",
                "shape": [
                    choice.batch,
                    *((frames, side, side, 3) if of_frames else (3, frames, side, side)),
                ],
                "colours": "RGB",
                "range": [0, 255] if of_frames else None,
                "normalised": not of_frames,
            },
            "output": {
                "name": choice.names[1],
                "dtype": "float32",
                "shape": [choice.batch, len(info.labels)],
            },
            "resize": "short side to short_side, aspect ratio kept, bilinear, antialiased",
            "views": {"clips": info.clips, "crops": info.crops, "combined": "mean of scores"},
            "weights": {
                "sha256": _sha256(self.checkpoint),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "licence": choice.licence or None,
            },
            "checkpoint": json.loads(replace(info, data_folder="").to_json()),
        }

    def write(self, target: Path, clips: Tensor) -> list[Agreement]:
        """Write the file, and compare what it computes with the model before it gets its name.

        Args:
            target: file with the suffix of the format.
            clips: to compare on, uint8 ``[N, 3, T, S, S]``; see :func:`test_clips`.

        Returns:
            How well they agree, for batches of 1 and 3, or of the fixed size.

        Raises:
            WorkFailed: it cannot be converted, or computes something else; then there is no file.
        """
        kind, text = FORMATS[self.choice.format], json.dumps(self.document(), ensure_ascii=False)
        found: list[Agreement] = []

        def fill(path: Path) -> None:
            try:
                kind.write(self.program, path, text, self.choice.names)
                run = kind.open(path)
                found.extend(
                    self._compare(run, clips, batch)
                    for batch in ([self.choice.batch] if self.choice.batch else _DYNAMIC_BATCHES)
                )
            except (OSError, MemoryError, OgregError):
                raise
            except Exception as error:
                raise self._failed("cannot be written as", error) from error
            self._check(found)

        write_atomic(target, fill)
        return found

    def _compare(self, run: Run, clips: Tensor, batch: int) -> Agreement:
        part = clips[torch.arange(batch) % len(clips)]
        info = self.info
        if self.choice.input == "frames":
            expected = score_views(self.model, part.unsqueeze(1), info.mean, info.std)
            found = run(rearrange(part, "b c t h w -> b t h w c").contiguous())
            return _agreement(_log(expected), _log(found))
        clip = to_input(part, info.mean, info.std)
        with torch.inference_mode():
            expected = self.model(clip)
        return _agreement(expected, run(clip))

    def _check(self, found: list[Agreement]) -> None:
        """Refuse if one does not hold."""
        for one in found:
            if not one.holds:
                raise WorkFailed(
                    f"the exported {self.info.model} does not compute what the model does; no file was written",
                    where=f"batch of {one.batch}",
                    why=f"logits are up to {one.difference:.3g} apart, of a range of {one.range:.3g}; "
                    f"allowed is {one.allowed:.3g}",
                    fix=self._other_format(),
                )

    def _failed(self, what: str, error: Exception) -> WorkFailed:
        name = {"torch": "a torch.export archive", "onnx": "ONNX"}[self.choice.format]
        return WorkFailed(
            f"{self.info.model} {what} {name}", why=_first_line(error), fix=self._other_format()
        )

    def _other_format(self) -> str:
        if self.choice.format == "torch":
            return ""
        return f"ogreg export {shlex.quote(str(self.checkpoint))} --format torch"


def trace_checkpoint(
    checkpoint: str | Path, choice: Choice, on_progress: ProgressCallback
) -> Traced:
    """Make a program of a checkpoint, on the CPU and in float32 whatever it was trained in.

    Args:
        checkpoint: file written by ogreg.
        choice: what to export.
        on_progress: is told what takes long.

    Raises:
        CheckpointError: missing, broken or not ours.
        EnvironmentFault: the packages of the format are missing.
        UsageError: the model needs frame times, which an exported file has no input for.
        WorkFailed: torch.export cannot follow the model.
    """
    require_packages(FORMATS[choice.format].writes_with)
    model, info = load_model(checkpoint)
    if takes_times(model):
        raise UsageError(
            f"{checkpoint} cannot be exported",
            why="its model needs the times of the frames, and exported files take the frames alone",
            fix="train one with model.options.position=rotary, which counts frames",
        )
    model.requires_grad_(False)
    start = time.perf_counter()
    try:
        program = _trace(model, info, choice)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        again = f"ogreg export {shlex.quote(str(checkpoint))} --format {choice.format} --batch 1"
        raise WorkFailed(
            f"torch.export cannot follow {info.model}",
            why=_first_line(error),
            fix="" if choice.batch else again,
        ) from error
    seconds = time.perf_counter() - start
    on_progress(Note(f"{info.model} traced in {seconds:.0f} s"))
    if choice.format == "onnx":
        on_progress(Note("converting to ONNX; deep models take minutes"))
    return Traced(Path(checkpoint), model, info, choice, program, seconds)


def _trace(model: nn.Module, info: CheckpointInfo, choice: Choice) -> ExportedProgram:
    frames, side = info.sampling.frames, info.size
    # An example of one clip would make the number 1 part of the program.
    batch = choice.batch or 2
    module: nn.Module = model
    example = torch.zeros(batch, 3, frames, side, side)
    if choice.input == "frames":
        module = _FromFrames(model, info).eval()
        example = torch.zeros(batch, frames, side, side, 3, dtype=torch.uint8)
    dynamic = {} if choice.batch else {0: Dim("batch", min=1)}
    with torch.no_grad():
        # Plain tracing is four times faster than strict. It takes the len() of a tensor for a fixed
        # number, which models must not ask for.
        return torch.export.export(module, (example,), dynamic_shapes=(dynamic,), strict=False)


def test_clips(info: CheckpointInfo, video: str | Path | None) -> Tensor:
    """Clips to compare on: the middle view of a video as the checkpoint takes it, the same backwards,
    and mirrored.

    Args:
        info: of the checkpoint.
        video: file; None for a rendered motion.

    Returns:
        uint8 ``[3, 3, T, S, S]``.

    Raises:
        VideoError: the file cannot be read.
    """
    if video is None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            write_video(path, render_clip("orbit_clockwise", seed=0), FPS)
            return test_clips(info, path)
    clip = read_views(video, info.views(clips=1, crops=1)).views
    return torch.cat([clip, clip.flip(2), clip.flip(-1)])


test_clips.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def _log(scores: Tensor) -> Tensor:
    """Logits up to a constant per clip, with their differences: small scores count as large ones do."""
    return scores.clamp_min(_LEAST_SCORE).log()


def _agreement(expected: Tensor, found: Tensor) -> Agreement:
    """Logits, or logarithms of scores, ``[B, classes]``."""
    ranges = expected.amax(dim=1) - expected.amin(dim=1)
    width = float(ranges.max())
    difference = float((found - expected).abs().max())
    return Agreement(len(expected), difference, width, TOLERANCE * width + _ROUNDING)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException | None) -> str:
    """What an error of torch says at its root, without the advice around it."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Args:
        path: the file.
        format: ``torch`` or ``onnx``.
        document: what stands in it, see the head of this module.
        info: the checkpoint that it was; its ``data_folder`` is empty.
    """

    path: Path
    format: str
    document: dict[str, Any]
    info: CheckpointInfo

    def open(self) -> Run:
        """The function that the file holds, on the CPU: clips as its ``input`` says, to what ``output``
        says. A ``.pt2`` file can run code when it is opened; open files that you trust.

        Raises:
            EnvironmentFault: onnxruntime is missing.
            CheckpointError: the file is broken.
        """
        try:
            return FORMATS[self.format].open(self.path)
        except Exception as error:
            raise CheckpointError(f"{self.path} cannot be opened", why=str(error)) from error


def read_exported(path: str | Path) -> Exported:
    """What an exported file says about itself; nothing in it is run.

    Raises:
        UsageError: neither ``.pt2`` nor ``.onnx``.
        CheckpointError: missing, broken, or not written by ogreg.
        EnvironmentFault: the file is ONNX and onnxruntime is missing.
    """
    path = Path(path)
    name = format_of(path)
    if not name:
        raise UsageError(f"{path} ends neither in .pt2 nor in .onnx")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", fix="check the path")
    require_packages(FORMATS[name].reads_with)
    try:
        text = FORMATS[name].read_text(path)
    except Exception as error:
        raise CheckpointError(f"{path} is broken", why=str(error)) from error
    if not text:
        raise CheckpointError(
            f"{path} was not exported by ogreg", why="it holds no description of model and labels"
        )
    try:
        document = json.loads(text)
        info = CheckpointInfo.from_json(json.dumps(document["checkpoint"]))
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} has a description that cannot be read", why=str(error)
        ) from error
    return Exported(path, name, document, info)
