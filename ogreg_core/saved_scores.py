"""The scores of an evaluation as a file: to score again, to compare, to fuse.

``scores.safetensors`` holds ``scores`` (float32 ``[N, classes]``, a row for every video of the
manifest, not-a-number where a video could not be read) and ``labels`` (int64 ``[N]``, the true
classes). Class names, paths, protocol, manifest hash and the reasons of unreadable videos are in its
metadata.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ogreg_core.data.loader import Unreadable
from ogreg_core.data.manifest import Manifest
from ogreg_core.errors import DataError
from ogreg_core.evaluation import Scores, ranks
from ogreg_core.files import write_atomic
from ogreg_core.statistics import mcnemar_exact, paired_difference_interval

__all__ = ["SCORES_FILE", "Comparison", "SavedScores", "compare", "fuse", "read_scores"]

SCORES_FILE = "scores.safetensors"
_KEY = "ogreg_scores"
_SCHEMA = 1
# What is kept of the circumstances of each member of a fusion: who it is, what it costs, and how it
# was chosen. A member that is a fusion itself brings its own.
_OF_MEMBERS = (
    *("checkpoint", "model", "options", "seed", "protocol", "classes", "frames", "size"),
    *("clips", "crops", "role", "chosen_on", "fused"),
)


@dataclass(frozen=True)
class SavedScores:
    """The scores of every video of a manifest.

    Args:
        found: of the videos that could be read, and which could not.
        targets: true class of every row, int64 ``[N]``.
        labels: class names by index.
        paths: of every row, as in the manifest.
        about: circumstances, ready for JSON: ``checkpoint``, ``model``, ``dataset``, ``split``,
            ``protocol``, ``manifest_sha256`` and more.
    """

    found: Scores
    targets: Tensor
    labels: tuple[str, ...]
    paths: tuple[str, ...]
    about: dict[str, Any]

    @classmethod
    def of(cls, found: Scores, manifest: Manifest, about: dict[str, Any]) -> SavedScores:
        """The scores of a manifest's videos."""
        targets = torch.tensor([row.label for row in manifest.rows])
        paths = tuple(row.path for row in manifest.rows)
        return cls(found, targets, manifest.labels, paths, about)

    def table(self) -> Tensor:
        """Scores of every row, float32 ``[N, classes]``, not-a-number where there are none."""
        table = torch.full((len(self.paths), len(self.labels)), torch.nan)
        table[self.found.indices] = self.found.scores
        return table

    def missed(self) -> list[int]:
        """True classes of the videos that could not be read."""
        return [int(self.targets[video.index]) for video in self.found.unreadable]

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        description = {
            "schema": _SCHEMA,
            "labels": self.labels,
            "paths": self.paths,
            "about": self.about,
            "unreadable": [asdict(video) for video in self.found.unreadable],
        }
        tensors = {"scores": self.table(), "labels": self.targets}
        metadata = {_KEY: json.dumps(description, ensure_ascii=False)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_scores(path: str | Path) -> SavedScores:
    """Read what :meth:`SavedScores.write` wrote.

    Args:
        path: the file, or the folder of the evaluation.

    Raises:
        DataError: missing, broken, or another kind of file.
    """
    path = Path(path)
    file = path / SCORES_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{path} holds no scores of an evaluation",
            why=f"{file} does not exist",
            fix=f"name a folder that `ogreg eval` wrote, or its {SCORES_FILE}",
        )
    try:
        with safe_open(file, framework="pt") as content:
            description = json.loads((content.metadata() or {})[_KEY])
            return _parse(description, content.get_tensor("scores"), content.get_tensor("labels"))
    except KeyError as error:
        raise DataError(
            f"{file} holds no scores of an evaluation",
            why=f"it lacks {error}",
            fix="it may be a checkpoint; score it: ogreg eval FILE",
        ) from error
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read", why=str(error), fix="run `ogreg eval` again"
        ) from error


def _parse(description: dict[str, Any], table: Tensor, targets: Tensor) -> SavedScores:
    labels, paths = tuple(description["labels"]), tuple(description["paths"])
    if table.shape != (len(paths), len(labels)) or targets.shape != (len(paths),):
        raise ValueError(
            f"scores of shape {list(table.shape)} for {len(paths)} videos of {len(labels)} classes"
        )
    unreadable = tuple(Unreadable(**video) for video in description["unreadable"])
    without = {video.index for video in unreadable}
    indices = torch.tensor([i for i in range(len(paths)) if i not in without], dtype=torch.int64)
    found = Scores(table[indices], targets[indices], indices, unreadable)
    return SavedScores(found, targets, labels, paths, description["about"])


def _check_same(first: SavedScores, second: SavedScores, names: Sequence[str]) -> None:
    """Refuse scores that are not of the same videos and classes.

    Raises:
        DataError: says what differs.
    """
    for thing, ours, theirs in (
        ("classes", first.labels, second.labels),
        ("videos", first.paths, second.paths),
        ("labels", first.targets.tolist(), second.targets.tolist()),
    ):
        if ours != theirs:
            raise _other(first, second, names, thing, _difference(thing, ours, theirs, names))
    if first.about["manifest_sha256"] != second.about["manifest_sha256"]:
        why = "paths and labels agree; frames, rates, sizes or decoders do not"
        raise _other(first, second, names, "manifest rows", why)


def _difference(
    thing: str, ours: Sequence[Any], theirs: Sequence[Any], names: Sequence[str]
) -> str:
    a, b = names
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            place = "class" if thing == "classes" else "row"
            return f"{place} {number} is {one!r} in {a} and {other!r} in {b}"
    return f"{len(ours)} {thing} in {a}, {len(theirs)} in {b}"


def _other(
    first: SavedScores, second: SavedScores, names: Sequence[str], thing: str, why: str
) -> DataError:
    places = [
        f"{name}: {saved.about['dataset']}/{saved.about['split']}, "
        f"manifest {saved.about['manifest_sha256'][:12]}"
        for name, saved in zip(names, (first, second), strict=True)
    ]
    return DataError(
        f"{names[1]} was scored on other {thing} than {names[0]}",
        where="\n".join(places),
        why=why,
        fix="score both checkpoints on one data set: ogreg eval CHECKPOINT --data FOLDER --split SPLIT",
    )


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on every video of a manifest; A is the first. A video that one could not read is
    wrong there, as in its own score.

    Args:
        right: whether A and B are right, bool ``[2, N]``.
        predicted: classes, int64 ``[2, N]``; -1 where there is no score or it is not a number.
        probability: of them, float32 ``[2, N]``; not-a-number likewise.
        unreadable: how many videos A and B could not read.
    """

    right: Tensor
    predicted: Tensor
    probability: Tensor
    unreadable: tuple[int, int]

    @property
    def videos(self) -> int:
        """Rows of the manifest."""
        return self.right.shape[1]

    def counts(self) -> dict[str, int]:
        """Videos that ``both_right``, ``only_a``, ``only_b``, ``both_wrong``."""
        a, b = self.right
        parts = {"both_right": a & b, "only_a": a & ~b, "only_b": b & ~a, "both_wrong": ~(a | b)}
        return {name: int(part.sum()) for name, part in parts.items()}

    def top1(self) -> tuple[float, float]:
        """Top-1 of A and B in percent."""
        a, b = (100.0 * right.sum().item() / self.videos for right in self.right)
        return a, b

    def p_value(self) -> float:
        """Of McNemar's exact two-sided test."""
        counts = self.counts()
        return mcnemar_exact(counts["only_a"], counts["only_b"])

    def interval(self) -> tuple[float, float]:
        """Tango's 95 % interval of B - A in points."""
        counts = self.counts()
        low, high = paired_difference_interval(counts["only_a"], counts["only_b"], self.videos)
        return 100 * low, 100 * high

    def changed(self) -> list[int]:
        """Manifest rows of the videos that one gets right and the other wrong."""
        changed: list[int] = (self.right[0] != self.right[1]).nonzero().flatten().tolist()
        return changed


def compare(
    first: SavedScores, second: SavedScores, names: tuple[str, str] = ("A", "B")
) -> Comparison:
    """Pair two evaluations video by video.

    Args:
        first, second: of the same manifest.
        names: for messages.

    Raises:
        DataError: manifests or classes differ.
    """
    _check_same(first, second, names)
    # Rows without scores are not-a-number, of which `ranks` makes no prediction.
    tables = torch.stack([saved.table() for saved in (first, second)])
    probability, predicted = tables.max(dim=2)
    return Comparison(
        right=torch.stack([ranks(table, first.targets) == 1 for table in tables]),
        predicted=predicted.where(~probability.isnan(), -1),
        probability=probability,
        unreadable=(len(first.found.unreadable), len(second.found.unreadable)),
    )


def fuse(
    members: Sequence[SavedScores], weights: Sequence[float], names: Sequence[str]
) -> tuple[SavedScores, int]:
    """Late fusion: the weighted mean of scores.

    A video that some members could not read gets the weighted mean of the others.

    Args:
        members: of the same manifest.
        weights: of each, not negative; only their proportions matter.
        names: for messages, and to be remembered.

    Returns:
        The fused scores, and how many videos only some of the members scored.

    Raises:
        DataError: manifests or classes differ, or no video has a score.
    """
    for member, name in zip(members[1:], names[1:], strict=True):
        _check_same(members[0], member, (names[0], name))
    first = members[0]
    total = torch.zeros(len(first.paths), len(first.labels), dtype=torch.float64)
    share = torch.zeros(len(first.paths), 1, dtype=torch.float64)
    for member, weight in zip(members, weights, strict=True):
        rows = member.found.indices
        total[rows] += weight * member.found.scores.double()
        share[rows] += weight
    scored = share[:, 0] > 0
    if not bool(scored.any()):
        raise DataError("not one video has a score")
    reasons = {video.index: video for member in members for video in member.found.unreadable}
    without = tuple(reasons[int(row)] for row in (~scored).nonzero())
    rows = scored.nonzero().flatten()
    partly = int((share[rows, 0] < sum(weights) * (1 - 1e-9)).sum())
    fused = Scores((total[rows] / share[rows]).float(), first.targets[rows], rows, without)
    about = _about_fusion(members, weights, names)
    return SavedScores(fused, first.targets, first.labels, first.paths, about), partly


def _about_fusion(
    members: Sequence[SavedScores], weights: Sequence[float], names: Sequence[str]
) -> dict[str, Any]:
    """The circumstances of a fusion under the names of those of an evaluation; null where members
    differ, and the members as ``fused``.
    """
    everything = [member.about for member in members]
    about = {
        key: value if all(other.get(key) == value for other in everything) else None
        for key, value in everything[0].items()
    }
    protocols = dict.fromkeys(str(other["protocol"]) for other in everything)
    parts = [
        {"path": name, "weight": weight}
        | {key: other.get(key) for key in _OF_MEMBERS if key in other}
        for name, weight, other in zip(names, weights, everything, strict=True)
    ]
    return {
        **about,
        "checkpoint": "",
        "model": _joined_models([str(other["model"]) for other in everything]),
        # No run of the members' recipe: nothing that its seeds could be averaged with.
        "recipe_sha256": "",
        "experiment_sha256": "",
        "seed": None,
        "epoch": None,
        "role": "",
        "chosen_on": None,
        "protocol": f"fusion of {len(members)}, {' + '.join(protocols)}",
        "fused": parts,
    }


def _joined_models(names: Sequence[str]) -> str:
    """``3 x ogreg-t + xvit``."""
    counts = Counter(names)
    return " + ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
