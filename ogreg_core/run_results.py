"""What a run scored, how, and with which models: the part of a report that reads.

Of runs of any version and of files that somebody has edited: what cannot be understood is refused with
the reason, nothing else is raised.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ogreg_core.errors import DataError
from ogreg_core.run_records import RunRecord, read_run
from ogreg_core.statistics import wilson_interval

__all__ = ["Member", "Result", "read_result"]

# Of so many classes all are among the five best.
_NO_TOP5 = 5


@dataclass(frozen=True)
class Member:
    """A model that took part in a score.

    Args:
        checkpoint: absolute path of the weights; empty if unknown.
        model, options: names and architecture options.
        classes, frames, size: of the model's input and head; None if unknown.
        views: clips x crops; None if unknown.
        protocol: how it was scored, in words.
    """

    checkpoint: str
    model: str
    options: dict[str, Any]
    classes: int | None
    frames: int | None
    size: int | None
    views: int | None
    protocol: str


@dataclass(frozen=True)
class Result:
    """What one run scored, and how.

    Args:
        run: its record.
        checkpoint: absolute path of the weights; empty for fused scores.
        experiment: hash of the recipe without its seed, or what stands for it in older runs.
        seed: of the training; None if unknown.
        recipe, model, options: names and architecture options.
        members: the models that took part: one, or those of a fusion.
        views: clips x crops, of all members; None if unknown or different.
        dataset, split, manifest: what was scored; the manifest by its hash.
        protocol: how, in words.
        top1, top5: in percent; no top-5 of at most five classes.
        intervals: Wilson intervals of both, None where not reported.
        role: of the checkpoint, ``best`` or ``last``; empty if unknown or a fusion.
        chosen_from: validations on this very split of which the best gave the checkpoint; 0 if it
            was not chosen on it, -1 if it was and their number is unknown, None if it is unknown
            whether it was.
        or_more: whether there may have been more of them.
    """

    run: RunRecord
    checkpoint: str
    experiment: str
    seed: int | None
    recipe: str
    model: str
    options: dict[str, Any]
    members: tuple[Member, ...]
    views: int | None
    dataset: str
    split: str
    manifest: str
    protocol: str
    top1: float
    top5: float | None
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None]
    role: str
    chosen_from: int | None
    or_more: bool = False

    @property
    def group(self) -> tuple[str, ...]:
        """Results that agree in this are averaged."""
        return (self.experiment, self.protocol, self.dataset, self.split, self.manifest, self.role)


def read_result(run: RunRecord) -> Result:
    """What a run scored.

    Raises:
        DataError: it is not finished, or its figures are not there or make no sense.
    """
    # An evaluation that missed an expectation has failed, but its report is complete: it is written last.
    scored = run.kind != "train" and run.report and run.state == "failed"
    if run.state != "done" and not scored:
        raise DataError(_why_unfinished(run))
    try:
        return _of_training(run) if run.kind == "train" else _of_evaluation(run)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(
            f"what it reports makes no sense: {type(error).__name__}: {error}"
        ) from error


def _why_unfinished(run: RunRecord) -> str:
    parts = [run.reason, f"epoch {run.epoch} of {run.epochs}" if run.epoch and run.epochs else ""]
    if run.state != "running" and run.resume:
        parts.append(f"continue: {run.resume}")
    return "; ".join(" ".join(part.split()) for part in parts if part) or "it has no score"


def _of_training(run: RunRecord) -> Result:
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.evaluate_checkpoint import protocol

    file = run.path / "checkpoints" / "best.safetensors"
    text = _description(file)
    if not text:
        raise DataError(f"{file} is missing or cannot be read")
    try:
        info = CheckpointInfo.from_json(text)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file} describes itself in words of another version: {error}") from error
    views = info.views()
    top1 = _float(info.metrics.get("top1", run.top1))
    top5 = _float(info.metrics.get("top5")) if len(info.labels) > _NO_TOP5 else None
    if top1 is None:
        raise DataError(f"{file} does not tell its score")
    member = Member(
        checkpoint=str(file.resolve()),
        model=info.model,
        options=info.options,
        classes=len(info.labels),
        frames=info.sampling.frames,
        size=info.size,
        views=views.count,
        protocol=protocol(views),
    )
    return Result(
        run=run,
        checkpoint=member.checkpoint,
        experiment=info.experiment_sha256 or info.recipe_sha256 or str(file.resolve()),
        seed=info.seed if info.experiment_sha256 else _seed(run),
        recipe=info.recipe,
        model=info.model,
        options=info.options,
        members=(member,),
        views=member.views,
        dataset=info.dataset,
        split=info.split,
        manifest=str((run.data.get("val") or {}).get("sha256", "")),
        protocol=member.protocol,
        top1=top1,
        top5=top5,
        intervals=(_wilson(top1, run.videos), _wilson(top5, run.videos)),
        role="best",
        chosen_from=len(run.validations) or -1,
    )


def _seed(run: RunRecord) -> int | None:
    seed = run.values.get("seed")
    return seed if isinstance(seed, int) else None


def _wilson(accuracy: float | None, videos: int | None) -> tuple[float, float] | None:
    if accuracy is None or not videos or not 0 <= accuracy <= 100:
        return None
    low, high = wilson_interval(round(accuracy / 100 * videos), videos)
    return 100 * low, 100 * high


def _of_evaluation(run: RunRecord) -> Result:
    report = run.report
    if run.top1 is None:
        raise DataError(f"{run.path / 'report.json'} does not tell a score")
    checkpoint = str(report.get("checkpoint") or "")
    text = _description(Path(checkpoint)) if checkpoint else ""
    # Reports of older versions say less; the checkpoint, if it is still there, says the rest.
    described: dict[str, Any] = json.loads(text) if text else {}
    classes = len(described.get("labels", ())) or _count_classes(run.path / "per_class.csv")
    frames = described.get("sampling", {}).get("frames")
    about = {**described, "frames": frames, "classes": classes, **report}
    members = tuple(_member(member) for member in _flat([about]))
    experiment = about.get("experiment_sha256") or about.get("recipe_sha256")
    has_top5 = (_whole(about.get("classes")) or _NO_TOP5 + 1) > _NO_TOP5
    views = {member.views for member in members} if "clips" in report else {None}
    chosen, or_more = _chosen(about, described)
    return Result(
        run=run,
        checkpoint=checkpoint,
        experiment=str(experiment or checkpoint or run.path.resolve()),
        seed=_whole(about.get("seed")) if checkpoint else None,
        recipe=str(about.get("recipe") or ""),
        model=run.model,
        options=dict(about.get("options") or {}),
        members=members,
        views=views.pop() if len(views) == 1 else None,
        dataset=str(report.get("dataset") or ""),
        split=str(report.get("split") or ""),
        manifest=str(report.get("manifest_sha256") or ""),
        protocol=str(report.get("protocol") or ""),
        top1=run.top1,
        top5=_float(report.get("top5_pct")) if has_top5 else None,
        intervals=(
            _interval(report.get("top1_interval_pct")),
            _interval(report.get("top5_interval_pct")),
        ),
        role="" if about.get("fused") else _role(about),
        chosen_from=chosen,
        or_more=or_more,
    )


def _flat(members: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The members of fusions in fusions; those without weight take no part."""
    for member in members:
        if member.get("weight") == 0:
            continue
        if member.get("fused"):
            yield from _flat(member["fused"])
        else:
            yield member


def _member(about: dict[str, Any]) -> Member:
    clips, crops = _whole(about.get("clips")), _whole(about.get("crops"))
    return Member(
        checkpoint=str(about.get("checkpoint") or ""),
        model=str(about.get("model") or ""),
        options=dict(about.get("options") or {}),
        classes=_whole(about.get("classes")),
        frames=_whole(about.get("frames")),
        size=_whole(about.get("size")),
        views=clips * crops if clips and crops else None,
        protocol=str(about.get("protocol") or ""),
    )


def _role(about: dict[str, Any]) -> str:
    """Of the checkpoint; older reports do not tell it, but the file's name does in its run folder."""
    role = about.get("role")
    file = Path(str(about.get("checkpoint") or ""))
    if role or file.parent.name != "checkpoints":
        return str(role or "")
    return file.stem if file.stem in ("best", "last") else ""


def _chosen(about: dict[str, Any], described: dict[str, Any]) -> tuple[int | None, bool]:
    """``chosen_from`` and ``or_more`` of a result. A fusion is chosen on a split as soon as one of its
    members is.
    """
    found = [
        _chosen_alone(member, about, described if member is about else {})
        for member in _flat([about])
    ]
    on_it = [count for count, _ in found if count]
    if not on_it:
        return (None if any(count is None for count, _ in found) else 0), False
    count = -1 if min(on_it) < 0 else max(on_it)
    return count, any(or_more for _, or_more in found)


def _chosen_alone(
    member: dict[str, Any], scored: dict[str, Any], described: dict[str, Any]
) -> tuple[int | None, bool]:
    """The same of one checkpoint, by what its evaluation wrote down, or else by its training's run."""
    place = member.get("chosen_on")
    if place is None and described and _role(member) == "best":
        training = read_run(Path(str(member["checkpoint"])).parent.parent)
        count = len(training.validations) if training else 0
        names = {key: described.get(key) for key in ("dataset", "split")}
        place = {**names, "validations": count or None, "or_more": False}
    if place is None:
        # The latest of a training is chosen nowhere.
        return (0 if _role(member) == "last" else None), False
    count = 0 if place["validations"] == 0 else _whole(place["validations"]) or -1
    if any(place[key] != scored.get(key) for key in ("dataset", "split")):
        return 0, False
    return count, bool(place.get("or_more")) and count > 0


def _float(value: Any) -> float | None:
    """A finite number or nothing.

    Raises:
        TypeError: something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value) if math.isfinite(value) else None


def _whole(value: Any) -> int | None:
    """A whole number or nothing.

    Raises:
        TypeError: something else.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _interval(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = (_float(end) for end in value)
    return None if low is None or high is None else (low, high)


def _count_classes(path: Path) -> int | None:
    if not path.is_file():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        return sum(1 for _ in csv.DictReader(file)) or None


def _description(checkpoint: Path) -> str:
    """The JSON text in which a checkpoint describes itself; empty if there is none to be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(checkpoint, framework="np") as file:
            return str((file.metadata() or {}).get("ogreg", ""))
    except (SafetensorError, OSError):
        return ""
