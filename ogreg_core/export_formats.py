"""The files of exported models: what torch and ONNX write and read, and where the description lies in
them.

``.pt2`` is an archive of torch.export, of which the description is an extra file; ``.onnx`` has it among
its ``metadata_props``. Both are one file with everything in it. Packages of ONNX are optional, and
imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ogreg_core.errors import EnvironmentFault

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

__all__ = ["FORMATS", "KEY", "Format", "Run", "format_of", "require_packages"]

KEY = "ogreg.json"
"""Under this name the description lies in a file."""

Run = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Args:
        suffix: of its names.
        write: program, path, description, and names of input and output.
        read_text: the description in a file; runs nothing that is in it.
        open: the function that a file holds, on the CPU.
        writes_with, reads_with: optional packages.
    """

    suffix: str
    write: Callable[[ExportedProgram, Path, str, tuple[str, str]], None]
    read_text: Callable[[Path], str]
    open: Callable[[Path], Run]
    writes_with: tuple[str, ...] = ()
    reads_with: tuple[str, ...] = ()


def require_packages(packages: tuple[str, ...]) -> None:
    """Refuse if a package of the extra ``onnx`` is missing; imports none.

    Raises:
        EnvironmentFault: names them, and what installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentFault(
            f"ONNX needs {', '.join(missing)}",
            why="not installed; ogreg's extra 'onnx' brings it",
            fix="pip install 'ogreg[onnx]'",
        )


def format_of(path: Path) -> str:
    """The format whose suffix a file has: ``torch`` or ``onnx``; empty if it is another."""
    return next((name for name, kind in FORMATS.items() if kind.suffix == path.suffix), "")


# --- torch.export ------------------------------------------------------------------------------


def _write_torch(program: ExportedProgram, path: Path, text: str, _names: tuple[str, str]) -> None:
    import torch

    # An open file: of a path torch demands its own suffix, which a temporary file has not.
    with open(path, "wb") as file:
        torch.export.save(program, file, extra_files={KEY: text})


def _read_torch(path: Path) -> str:
    """The archive is a zip file: what could run code is not touched."""
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/extra/{KEY}")), "")
        return archive.read(name).decode() if name else ""


def _open_torch(path: Path) -> Run:
    import torch

    with open(path, "rb") as file:
        module = torch.export.load(file).module()

    def run(clips: Tensor) -> Tensor:
        with torch.inference_mode():
            result: Tensor = module(clips)
        return result

    return run


# --- ONNX --------------------------------------------------------------------------------------


def _stable_sort(
    values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    """``aten.sort.stable``, which torch cannot translate (2.15): of equal elements TopK, too, puts the
    one with the lower index first.
    """
    op = importlib.import_module("onnxscript").opset18
    length = op.Slice(op.Shape(values), [dim], [dim + 1] if dim != -1 else [2**31 - 1], [0])
    return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)


def _write_onnx(program: ExportedProgram, path: Path, text: str, names: tuple[str, str]) -> None:
    import torch

    with _quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[names[0]],
            output_names=[names[1]],
            # Names the dimension, if it is one.
            dynamic_shapes=({0: "batch"},),
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
    assert converted is not None
    converted.model.metadata_props[KEY] = text
    converted.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """While active, the exporter keeps its remarks to itself: they are about its own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _session(path: Path) -> Any:
    runtime = importlib.import_module("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _read_onnx(path: Path) -> str:
    text: str = _session(path).get_modelmeta().custom_metadata_map.get(KEY, "")
    return text


def _open_onnx(path: Path) -> Run:
    import torch

    session = _session(path)
    name = session.get_inputs()[0].name

    def run(clips: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: clips.cpu().numpy()})[0])

    return run


FORMATS = {
    "torch": Format(".pt2", _write_torch, _read_torch, _open_torch),
    "onnx": Format(
        ".onnx",
        _write_onnx,
        _read_onnx,
        _open_onnx,
        writes_with=("onnx", "onnxscript", "onnxruntime"),
        reads_with=("onnxruntime",),
    ),
}
