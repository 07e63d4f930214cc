"""Foreign checkpoints turned into ours: the right model, complete, with labels and protocol.

Stricter than starting weights (:mod:`ogreg_core.models.weights`): every tensor of the model must come
from the file, and every tensor of the file must have a place or be left out by the model's key map. Only
names and shapes are compared, so models are built on torch's meta device, which takes no time or memory.

A classifier of other classes is refused, not replaced: a checkpoint describes itself as a finished model,
and one with a new head is none. That is what training from starting weights is for.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ogreg_core.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from ogreg_core.data.manifest import LABELS_FILE
from ogreg_core.datasets.locations import known_datasets
from ogreg_core.errors import CheckpointError, DataError, OgregError
from ogreg_core.models.option_words import model_words
from ogreg_core.models.registry import MODELS, create_model, find_model, named_function
from ogreg_core.models.weights import load_torchvision, map_names, read_state_file

__all__ = [
    "ClassNames",
    "Conversion",
    "Fit",
    "Foreign",
    "compare",
    "convert",
    "find_class_names",
    "nearest_model",
    "read_foreign",
    "settings_in",
]

_HEAD = "head."


@dataclass(frozen=True)
class Fit:
    """How names and shapes of a foreign state dict compare with a model's.

    Args:
        model, options: the model.
        fitting: names with equal shapes on both sides.
        missing: tensors of the model that the file does not have.
        other_shape: name and both shapes, the file's first.
        unexpected: tensors of the file without a place in the model.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    fitting: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    other_shape: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is left over on either side."""
        return not (self.missing or self.other_shape or self.unexpected)

    @property
    def share(self) -> float:
        """Fitting names among all names of both sides, 0..1."""
        rest = len(self.missing) + len(self.other_shape) + len(self.unexpected)
        return len(self.fitting) / max(len(self.fitting) + rest, 1)

    @property
    def without_head(self) -> bool:
        """Whether all fits but a classifier, which the file does not have."""
        only = all(name.startswith(_HEAD) for name in self.missing)
        return bool(self.missing) and only and not (self.other_shape or self.unexpected)

    def name(self) -> str:
        """The model with the options that differ from its usual ones: ``ogreg-t, stem=patch``."""
        return model_words(self.model, self.options)

    def describe(self) -> str:
        """What does not fit, in one line."""
        total = len(self.fitting) + len(self.missing) + len(self.other_shape)
        parts = [f"{len(self.fitting)} of the model's {total} tensors fit"]
        for word, names in (
            ("missing", self.missing),
            ("of another shape", self.other_shape),
            ("without a place", self.unexpected),
        ):
            if names:
                more = f" and {len(names) - 2} more" if len(names) > 2 else ""
                parts.append(f"{word}: {', '.join(names[:2])}{more}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Conversion:
    """What became of a foreign checkpoint.

    Args:
        model, options: what it was turned into.
        classes: size of the head.
        tensors, parameters: of the written checkpoint; buffers count among the tensors only.
        left_out: names of the file that the key map leaves out.
    """

    model: str
    options: dict[str, Any]
    classes: int
    tensors: int
    parameters: int
    left_out: list[str]


@dataclass(frozen=True)
class ClassNames:
    """Class names by index, and where they come from.

    Args:
        names: in the order of the classifier.
        origin: a phrase for the user.
        dataset, folder: the data set they belong to and where it was prepared, if known.
    """

    names: list[str]
    origin: str
    dataset: str = ""
    folder: str = ""


# --- reading -----------------------------------------------------------------------------------


class Foreign(NamedTuple):
    """What a foreign checkpoint holds.

    Args:
        state: its tensors.
        names: of its classes, if they are known.
        configuration: text of the configuration beside the weights; empty if there is none.
    """

    state: dict[str, Tensor]
    names: ClassNames | None = None
    configuration: str = ""


def read_foreign(source: str) -> Foreign:
    """Read a file, or pretrained weights by torchvision's name.

    Raises:
        CheckpointError: missing or broken, or one of our own checkpoints already.
        UsageError: neither a file nor a known name.
    """
    path = Path(source)
    if not path.exists() and source.isidentifier():
        state, names = load_torchvision(source)
        dataset = _KINETICS if names == _kinetics_classes() else ""
        folder = known_datasets().get(dataset)
        known = ClassNames(names, f"torchvision's {source}", dataset, str(folder or ""))
        return Foreign(state, known)
    if path.suffix == ".safetensors" and path.is_file() and _is_ours(path):
        raise CheckpointError(
            f"{path} is a checkpoint of ogreg already",
            why="it describes its model, labels and protocol itself",
            fix=f"ogreg eval {shlex.quote(str(path))}",
        )
    state, configuration = read_state_file(path)
    return Foreign(state, configuration=configuration)


def settings_in(model: str, state: Mapping[str, Tensor], configuration: str = "") -> dict[str, Any]:
    """Options of a model that a foreign checkpoint tells of itself, as its shapes do."""
    reader = find_model(model).settings
    if not reader:
        return {}
    try:
        found: dict[str, Any] = named_function(reader)(state, configuration)
    except CheckpointError:
        # Of another model: what does not fit is said when names are compared.
        return {}
    return found


def _is_ours(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except CheckpointError:
        return False
    return True


def find_class_names(given: str) -> ClassNames:
    """Class names from a text file with one per line, or from a data set by name.

    Args:
        given: a file, the folder of a prepared data set, or a name: of a data set prepared on this
            machine, or ``kinetics400``, whose classes torchvision knows.

    Raises:
        DataError: none of these, or not readable.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / LABELS_FILE
    if path.is_file():
        return ClassNames(_read_names(path), str(path))
    folder = known_datasets().get(given)
    if folder is not None:
        names = _read_names(folder / LABELS_FILE)
        return ClassNames(names, f"{given} as prepared in {folder}", given, str(folder))
    if given == _KINETICS:
        return ClassNames(_kinetics_classes(), f"torchvision's {given}", given)
    raise DataError(
        f"no class names in {given!r}",
        why="it is neither a file nor a data set prepared on this machine: "
        f"{', '.join(known_datasets()) or 'there are none'}",
        fix="--labels FILE, with a name on each line",
    )


def _read_names(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix="save it as UTF-8") from error
    return [name.rstrip("\r") for name in text.removesuffix("\n").split("\n")]


_KINETICS = "kinetics400"


def _kinetics_classes() -> list[str]:
    from torchvision.models import get_model_weights

    return list(get_model_weights("swin3d_t").DEFAULT.meta["categories"])


# --- comparing ---------------------------------------------------------------------------------


def compare(
    model: str,
    mapped: Mapping[str, Tensor],
    *,
    options: Mapping[str, Any] | None = None,
    frames: int | None = None,
    size: int | None = None,
) -> Fit:
    """Compare names and shapes with a model that has as many classes as the file's classifier.

    Args:
        model: key of the registry.
        mapped: under the model's names, see :func:`ogreg_core.models.weights.map_names`.
        options, frames, size: see :func:`ogreg_core.models.registry.create_model`.
    """
    return _compare(model, mapped, _shell(model, mapped, options or {}, frames, size), options)


def _shell(
    model: str,
    mapped: Mapping[str, Tensor],
    options: Mapping[str, Any],
    frames: int | None = None,
    size: int | None = None,
) -> torch.nn.Module:
    """The model without memory, with the classes of the file."""
    with torch.device("meta"):
        return create_model(model, _classes(mapped) or 1, frames=frames, size=size, **options)


def _compare(
    model: str,
    mapped: Mapping[str, Tensor],
    shell: torch.nn.Module,
    options: Mapping[str, Any] | None,
) -> Fit:
    own = shell.state_dict()
    fit = Fit(model, dict(options or {}))
    for name, tensor in mapped.items():
        if name not in own:
            fit.unexpected.append(name)
        elif own[name].shape == tensor.shape:
            fit.fitting.append(name)
        else:
            there, here = ("x".join(map(str, t.shape)) for t in (tensor, own[name]))
            fit.other_shape.append(f"{name} ({there}, not {here})")
    fit.missing.extend(name for name in own if name not in mapped)
    return fit


def _classes(mapped: Mapping[str, Tensor]) -> int:
    """Rows of the classifier; 0 if there is none."""
    heads = [tensor for name, tensor in mapped.items() if name.startswith(_HEAD) and tensor.ndim]
    return heads[-1].shape[0] if heads else 0


def _candidates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every model as it usually is, and with each single word of its options."""
    for name, entry in MODELS.items():
        if name.endswith("-ablation"):
            # Nobody has weights of it but us, and ours say what they are.
            continue
        yield name, {}
        for option, words in entry.options.items():
            if isinstance(words, tuple):
                yield from ((name, {option: word}) for word in words)


def _plausible(state: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Candidates with what the checkpoint tells of itself."""
    told = {name: settings_in(name, state) for name in MODELS}
    for name, options in _candidates():
        yield name, {**told[name], **options}


def nearest_model(
    state: Mapping[str, Tensor], token_selection: Mapping[str, Any] | None = None
) -> Fit | None:
    """The model of the registry that shares most names and shapes with a foreign state dict; None if
    not a single tensor fits any.
    """
    best: Fit | None = None
    for model, options in _plausible(state):
        if token_selection and find_model(model).places:
            options = {**options, "token_selection": token_selection}
        try:
            found = compare(model, map_names(model, state), options=options)
        except OgregError:
            # Its key map refuses the file, or the option does not go with the others' defaults.
            continue
        # An option is only blamed where it fits better than the usual model.
        if found.fitting and (best is None or found.share > best.share):
            best = found
    return best


# --- converting --------------------------------------------------------------------------------


def convert(
    state: Mapping[str, Tensor],
    info: CheckpointInfo,
    target: Path,
    *,
    source: str,
    again: Callable[[Fit], str] = lambda fit: f"--model {fit.model}",
) -> Conversion:
    """Write a foreign state dict as a checkpoint of ours.

    Args:
        state: as :func:`read_foreign` gives it.
        info: model, options, labels and protocol; without labels the classes are called by their
            numbers.
        target: file to write.
        source: named in errors.
        again: the command that would convert to a better fitting model.

    Raises:
        CheckpointError: the weights belong to another model (the nearest one is named), are
            incomplete, have another number of classes than ``info`` has labels, or are not finite.
    """
    mapped = map_names(info.model, state)
    shell = _shell(info.model, mapped, info.options, info.sampling.frames, info.size)
    fit = _compare(info.model, mapped, shell, info.options)
    if not fit.complete:
        raise _refusal(fit, state, source, again)
    classes = _classes(mapped)
    labels = info.labels or [str(number) for number in range(classes)]
    if len(labels) != classes:
        raise CheckpointError(
            f"{source} tells {classes} classes apart, and there are {len(labels)} labels",
            why="a checkpoint needs the name of every class, in the order of the classifier",
            fix=_train_from(source, "to learn other classes"),
        )
    broken = [name for name, tensor in mapped.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CheckpointError(
            f"{source} holds numbers that are not finite", why=f"in {', '.join(broken[:3])}"
        )
    own = shell.state_dict()
    tensors = {name: mapped[name].to(like.dtype) for name, like in own.items()}
    save_checkpoint(target, tensors, replace(info, labels=labels))
    kept = {tensor.untyped_storage().data_ptr() for tensor in mapped.values()}
    return Conversion(
        model=info.model,
        options=dict(info.options),
        classes=classes,
        tensors=len(tensors),
        parameters=sum(parameter.numel() for parameter in shell.parameters()),
        left_out=[n for n, t in state.items() if t.untyped_storage().data_ptr() not in kept],
    )


def _train_from(source: str, why: str) -> str:
    return f"ogreg train RECIPE --init-from {shlex.quote(source)}   # {why}"


def _refusal(
    fit: Fit, state: Mapping[str, Tensor], source: str, again: Callable[[Fit], str]
) -> CheckpointError:
    """Why not, and what would do: the nearest model, or a training where only the head is missing."""
    if fit.without_head:
        return CheckpointError(
            f"{source} has no classifier ({', '.join(fit.missing)})",
            why=f"all else fits {fit.name()}; these are starting weights",
            fix=_train_from(source, "learns one"),
        )
    why, fix = fit.describe(), _train_from(source, "takes what fits")
    # Without it first: the weights may have none.
    selection = fit.options.get("token_selection")
    matches = [nearest_model(state), nearest_model(state, selection) if selection else None]
    nearest = max((match for match in matches if match), key=lambda fit: fit.share, default=None)
    if nearest is None:
        return CheckpointError(
            f"{source} does not hold the weights of {fit.name()}",
            why=f"{why}; nor of any other model",
            fix="ogreg models",
        )
    if nearest.complete:
        why += f"\nnearest match: {nearest.name()}, which fits completely"
        return CheckpointError(
            f"{source} does not hold the weights of {fit.name()}", why=why, fix=again(nearest)
        )
    if nearest.share > fit.share:
        why += f"\nnearest match: {nearest.name()}, of which {nearest.share:.0%} fits"
    elif find_model(fit.model).fixed_input and fit.other_shape:
        why += "\nno other model is nearer; frames and size are built into this one"
        fix = "--frames and --size, as the weights were trained"
    else:
        why += "\nno other model is nearer"
    return CheckpointError(
        f"{source} does not hold the weights of {fit.name()}",
        why=why,
        fix=fix,
    )
