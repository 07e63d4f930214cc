"""Starting weights: map foreign state dicts onto a model and say exactly what was done.

Two-dimensional patch embeddings are inflated (repeated over the temporal taps and divided by their
number: Carreira and Zisserman 2017), so that a still clip gives what the image gave.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ogreg_core.errors import CheckpointError, UsageError

__all__ = ["LoadReport", "initialise", "load_state_file", "load_torchvision", "map_swin"]


@dataclass(frozen=True)
class LoadReport:
    """What became of a set of starting weights; every name of both sides occurs once.

    Args:
        source: where the weights came from.
        taken: parameters copied as they were.
        inflated: parameters repeated over time.
        missing: parameters of the model left at their initialisation.
        unexpected: names of the source without a place in the model.
        mismatched: names present on both sides with different shapes, left at their initialisation.
    """

    source: str
    taken: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"weights from {self.source}: {len(self.taken)} taken, {len(self.inflated)} inflated, "
            f"{len(self.missing)} left at initialisation, {len(self.unexpected)} not used, "
            f"{len(self.mismatched)} of another shape"
        )


def map_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's ``swin_*`` and ``swin3d_*`` to those of OG-ReG; other names stay as
    they are.

    In ``swin_*``, ``features`` alternates stages and mergings from index 1 on after the patch
    embedding at 0; in ``swin3d_*`` it starts with the first stage. Relative position tables have no
    place in OG-ReG and keep their name.
    """
    offset = 1 if "features.0.0.weight" in state else 0
    mapped: dict[str, Tensor] = {}
    for name, tensor in state.items():
        mapped[_swin_name(name, offset)] = tensor
    return mapped


def _swin_name(name: str, offset: int) -> str:
    for old, new in (
        (r"features\.0\.0\." if offset else r"patch_embed\.proj\.", "stem.proj."),
        (r"features\.0\.2\." if offset else r"patch_embed\.norm\.", "stem.norm."),
    ):
        name, count = re.subn(f"^{old}", new, name)
        if count:
            return name
    match = re.match(r"features\.(\d+)\.(.*)", name)
    if not match:
        return name
    position, rest = int(match[1]) - offset, match[2]
    if position % 2:
        return f"merges.{position // 2}.{rest}"
    rest = rest.replace("attn.qkv.", "glance.qkv.").replace("attn.proj.", "proj.")
    return f"stages.{position // 2}.{rest}"


def initialise(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    head: str = "head",
    classes: Sequence[str] | None = None,
    source_classes: Sequence[str] | None = None,
) -> LoadReport:
    """Copy what fits from ``state`` into ``model``.

    Args:
        model: receives the weights, in place.
        state: the foreign state dict, with the model's names (see :func:`map_swin`).
        source: named in the report.
        head: prefix of the classifier; taken only if both lists of class names are given and agree
            in order.
        classes, source_classes: class names of the model and of the source.

    Raises:
        CheckpointError: nothing but the head fits, so the checkpoint belongs to another model.
    """
    own = model.state_dict()
    report = LoadReport(source)
    same_classes = (
        classes is not None and source_classes is not None and list(classes) == list(source_classes)
    )
    for name, tensor in state.items():
        if name not in own:
            report.unexpected.append(name)
        elif name.startswith(f"{head}.") and not same_classes:
            report.mismatched.append(name)
        elif own[name].shape == tensor.shape:
            own[name] = tensor
            report.taken.append(name)
        elif (
            own[name].ndim == tensor.ndim + 1
            and own[name].shape[:2] + own[name].shape[3:] == tensor.shape
        ):
            taps = own[name].shape[2]
            own[name] = tensor.unsqueeze(2).repeat_interleave(taps, dim=2) / taps
            report.inflated.append(name)
        else:
            report.mismatched.append(name)
    placed = {*report.taken, *report.inflated, *report.mismatched}
    report.missing.extend(name for name in own if name not in placed)
    weights = [name for name in [*report.taken, *report.inflated] if own[name].ndim > 1]
    if not weights:
        raise CheckpointError(
            f"the weights in {source} fit none of the model's layers",
            why=f"{len(report.unexpected)} names are unknown, {len(report.mismatched)} have other shapes",
            fix="choose the model that these weights belong to (`ogreg models`)",
        )
    model.load_state_dict(own)
    return report


def load_state_file(path: str | Path) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from ``.pth``/``.pt`` without running any code in it.

    Raises:
        CheckpointError: missing, broken, or not a plain collection of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", fix="check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each have their own family of errors
        raise CheckpointError(
            f"{path} cannot be loaded as weights",
            why=str(error).splitlines()[0],
            fix="files with pickled objects are refused because loading them could run code; save a plain state_dict",
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(value, Tensor) for value in loaded.values()
    ):
        raise CheckpointError(f"{path} holds no state_dict of tensors")
    return loaded


# torchvision's names whose weights start an OG-ReG of the same size.
TORCHVISION_SWIN = ("swin_t", "swin_s", "swin_b", "swin3d_t", "swin3d_s", "swin3d_b")


def load_torchvision(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Pretrained weights by torchvision's name, through its own cache or the network, and their
    class names.

    Raises:
        UsageError: not one of ``TORCHVISION_SWIN``.
        CheckpointError: neither cached nor downloadable.
    """
    if name not in TORCHVISION_SWIN:
        raise UsageError(
            f"there are no starting weights called {name!r}",
            why=f"known names: {', '.join(TORCHVISION_SWIN)}",
        )
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    try:
        return weights.get_state_dict(progress=False, check_hash=True), list(
            weights.meta["categories"]
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights {name} are neither cached nor reachable",
            why=str(error),
            fix="download them elsewhere and pass the file: init.weights=PATH",
        ) from error
