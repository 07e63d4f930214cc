"""Where prepared data sets lie: a small JSON file, so that a recipe needs no path."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ogreg_core.data.manifest import DATASET_FILE, read_dataset_info
from ogreg_core.errors import DataError
from ogreg_core.files import write_text_atomic

__all__ = ["config_folder", "find_dataset", "known_datasets", "remember"]


def config_folder() -> Path:
    """``$OGREG_HOME``, else ``$XDG_CONFIG_HOME/ogreg``, else ``~/.config/ogreg``."""
    if home := os.environ.get("OGREG_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "ogreg"


def known_datasets() -> dict[str, Path]:
    """Remembered data sets by name; unreadable memory counts as empty."""
    try:
        content = json.loads((config_folder() / "datasets.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return {name: Path(path) for name, path in content.items()}


def remember(name: str, folder: Path) -> Path | None:
    """Note that data set ``name`` was prepared in ``folder``; a read-only home is no reason to
    fail.

    Returns:
        Where it was before, if that was another folder.
    """
    known = {key: str(path) for key, path in known_datasets().items()}
    before = known.get(name)
    known[name] = str(folder.resolve())
    config = config_folder()
    try:
        config.mkdir(parents=True, exist_ok=True)
        write_text_atomic(
            config / "datasets.json", json.dumps(known, indent=2, ensure_ascii=False) + "\n"
        )
    except OSError:
        return None
    return Path(before) if before not in (None, known[name]) else None


def _check_name(dataset: str, folder: Path) -> None:
    """Refuse a remembered folder that meanwhile holds another data set."""
    if (folder / DATASET_FILE).is_file() and (
        now := read_dataset_info(folder)["dataset"]
    ) != dataset:
        raise DataError(
            f"{folder} no longer holds {dataset}",
            why=f"{now} was prepared there since",
            fix=f"ogreg prepare {dataset} FOLDER --out ANOTHER_FOLDER",
        )


def _argument(dataset: str) -> str:
    """What follows ``ogreg prepare``."""
    return "demo FOLDER --hard" if dataset == "demo-hard" else f"{dataset} FOLDER"


def find_dataset(dataset: str, root: str) -> Path:
    """The manifest folder of a recipe's data set.

    Args:
        dataset: name, may be empty.
        root: explicit folder, may be empty; wins over the name.

    Raises:
        DataError: neither leads to a folder; says how to prepare it.
    """
    if root:
        return Path(root).expanduser()
    if dataset:
        known = known_datasets()
        if dataset in known:
            _check_name(dataset, known[dataset])
            return known[dataset]
        raise DataError(
            f"data set {dataset!r} has not been prepared on this machine",
            fix=f"ogreg prepare {_argument(dataset)}, or point to a prepared one: data.root=FOLDER",
        )
    raise DataError(
        "the recipe names no data set", fix="data.root=FOLDER, after `ogreg prepare folder FOLDER`"
    )
