"""Starting weights: map foreign state dicts onto a model and say exactly what was done.

Two-dimensional patch embeddings are inflated (repeated over the temporal taps and divided by their
number: Carreira and Zisserman 2017), so that a still clip gives what the image gave.

For OG-ReG names are known of torchvision's ``swin_*`` and ``swin3d_*``; of the checkpoints of Swin
(github.com/microsoft/Swin-Transformer), Video-Swin (github.com/SwinTransformer/Video-Swin-Transformer)
and timm, whose three spellings differ in prefixes and in the place of the mergings. All of them order the
channels of a merging, the query, key and value, and the MLP alike.
"""

from __future__ import annotations

import pickle
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ogreg_core.errors import CheckpointError, UsageError
from ogreg_core.models.registry import find_model, named_function

__all__ = [
    "PRETRAINED",
    "LoadReport",
    "initialise",
    "load_state_file",
    "load_torchvision",
    "map_names",
    "map_swin",
    "read_state_file",
    "rename",
]

_BLOCK = re.compile(r"(stages\.\d+)\.\d+\.")


@dataclass(frozen=True)
class LoadReport:
    """What became of a set of starting weights; every name of both sides occurs once.

    Args:
        source: where the weights came from.
        taken: parameters copied as they were.
        inflated: parameters repeated over time.
        missing: parameters of the model that the source does not have, left at their initialisation.
        unexpected: names of the source without a place in the model.
        mismatched: names present on both sides with different shapes, left at their initialisation.
        other_classes: parameters of the classifier present on both sides, left at their
            initialisation because class names differ or are not known.
        other_settings: options that the source was trained with and the model was not built with.
    """

    source: str
    taken: list[str] = field(default_factory=list)
    inflated: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    other_classes: list[str] = field(default_factory=list)
    other_settings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The source, how many names each list has, and the lists: ready for JSON."""
        content = asdict(self)
        counts = {key: len(names) for key, names in content.items() if key != "source"}
        return {"schema": "ogreg.init.v1", "source": self.source, "counts": counts, **content}

    def summary(self) -> str:
        """One line for the terminal: counts, and by name what matters."""
        placed = [*self.taken, *self.inflated]
        left = _grouped(self.missing, placed)
        left += [f"{group}, of another shape" for group in _grouped(self.mismatched, placed)]
        left += [f"{group}, of other classes" for group in _grouped(self.other_classes, placed)]
        parts = [f"{len(self.taken)} taken", f"{len(self.inflated)} inflated over time"]
        parts.append(f"left at initialisation: {', '.join(left) or 'none'}")
        if self.unexpected:
            parts.append(f"not used: {', '.join(_grouped(self.unexpected, self.unexpected))}")
        if self.other_settings:
            parts.append(f"trained with other options: {', '.join(self.other_settings)}")
        return f"weights from {self.source}: {'; '.join(parts)}"


def _grouped(names: Iterable[str], placed: Collection[str]) -> list[str]:
    """Names by the module they lie in: ``stages.*.gaze (24)``; blocks of which nothing
    was placed as ``2 whole blocks of stages.2``.
    """
    begun = {match[0] for name in placed if (match := _BLOCK.match(name))}
    blocks: dict[str, set[str]] = {}
    groups: Counter[str] = Counter()
    for name in names:
        match = _BLOCK.match(name)
        if match and match[0] not in begun:
            blocks.setdefault(match[1], set()).add(match[0])
        else:
            group = re.sub(r"(\.\d+)+(?=\.|$)", ".*", name.rpartition(".")[0] or name)
            groups[group.removesuffix(".*")] += 1
    whole = [f"{len(found)} whole blocks of {stage}" for stage, found in blocks.items()]
    return [*whole, *(f"{group} ({count})" for group, count in groups.items())]


def rename(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    """A name after every substitution (regular expression, replacement), one after the other."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def map_names(model: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A foreign state dict under the names of a model of the registry, by the model's key map.

    Raises:
        CheckpointError: the key map knows the file and refuses it.
    """
    key_map = find_model(model).key_map
    mapped: dict[str, Tensor] = named_function(key_map)(state) if key_map else dict(state)
    return mapped


def map_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of Swin in any of its spellings (see the top of this file) to those of OG-ReG; other
    names stay as they are. Relative position tables have no place in OG-ReG.

    Raises:
        CheckpointError: weights of Swin V2, whose blocks compute something else under the same names.
    """
    if any("cpb_mlp" in name or "logit_scale" in name for name in state):
        raise CheckpointError(
            "these are weights of Swin V2",
            why="its attention and the place of its norms differ, so that they fit by name alone",
            fix="choose weights of the first Swin or of Video-Swin",
        )
    plain = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    if any(name.startswith("layers.") for name in plain):
        # timm puts a merging at the beginning of a stage, the others at the end of the one before.
        first = 0 if "layers.0.downsample.reduction.weight" in plain else 1
        return {_official_name(name, first): tensor for name, tensor in plain.items()}
    offset = 1 if "features.0.0.weight" in plain else 0
    return {_torchvision_name(name, offset): tensor for name, tensor in plain.items()}


_OFFICIAL_STEMS = (
    (r"patch_embed\.", "stem."),
    (r"(head\.fc|cls_head\.fc_cls)\.", "head."),
)
_OFFICIAL_BLOCKS = {
    "attn.qkv.": "glance.qkv.",
    "attn.proj.": "proj.",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.3.",
}


def _official_name(name: str, first: int) -> str:
    """``first`` is the number of the ``layers`` that holds the first merging."""
    if match := re.match(r"layers\.(\d+)\.downsample\.(.*)", name):
        return f"merges.{int(match[1]) - first}.{match[2]}"
    if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.*)", name):
        rest = match[3]
        for old, new in _OFFICIAL_BLOCKS.items():
            rest = rest.replace(old, new)
        return f"stages.{match[1]}.{match[2]}.{rest}"
    return rename(name, ((f"^{old}", new) for old, new in _OFFICIAL_STEMS))


def _torchvision_name(name: str, offset: int) -> str:
    """In ``swin_*``, ``features`` alternates stages and mergings from index 1 on after the patch
    embedding at 0 (``offset`` 1); in ``swin3d_*`` it starts with the first stage (0).
    """
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
            report.other_classes.append(name)
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
    placed = {*report.taken, *report.inflated, *report.mismatched, *report.other_classes}
    report.missing.extend(name for name in own if name not in placed)
    if not any(own[name].ndim > 1 for name in [*report.taken, *report.inflated]):
        raise CheckpointError(
            f"the weights in {source} fit none of the model's layers",
            why=f"{len(report.unexpected)} names are unknown, {len(report.mismatched)} have other shapes",
            fix="choose the model that these weights belong to (`ogreg models`)",
        )
    model.load_state_dict(own)
    return report


def load_state_file(path: str | Path) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from ``.pth``/``.pt`` without running any code in it.

    Looks into ``state_dict``, ``model``, ``model_state`` and ``state_dict_ema``, and takes the prefix
    ``module.`` off, which DistributedDataParallel leaves.

    Raises:
        CheckpointError: missing, broken, or not a plain collection of tensors.
    """
    return read_state_file(path)[0]


def read_state_file(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """:func:`load_state_file`, and the text of the configuration that PySlowFast and its descendants
    write beside the weights under ``cfg``; empty if there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", fix="check the path")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path), ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_only_tensors(path, error) from error
    except Exception as error:  # zip and safetensors each have their own family of errors
        raise CheckpointError(
            f"{path} cannot be loaded as weights",
            why=(str(error) or type(error).__name__).splitlines()[0],
            fix="copy or download it again",
        ) from error
    configuration = loaded.get("cfg") if isinstance(loaded, dict) else ""
    for key in ("state_dict", "model", "model_state", "state_dict_ema"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise CheckpointError(f"{path} holds no state_dict of tensors")
    state = {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    return state, configuration if isinstance(configuration, str) else ""


def _not_only_tensors(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Not in torch's own words, which recommend to switch the protection off."""
    found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    return CheckpointError(
        f"{path} cannot be loaded as weights: loading it could run code",
        why=f"it names {found[1]}, which is no tensor"
        if found
        else "it is no plain pickle of tensors",
        fix="have its state_dict alone saved, best as .safetensors, by somebody who trusts the file",
    )


# Names of pretrained weights, and what torchvision calls them.
PRETRAINED = {
    "swin_t": "Swin_T_Weights.DEFAULT",
    "swin_s": "Swin_S_Weights.DEFAULT",
    "swin_b": "Swin_B_Weights.DEFAULT",
    "swin3d_t": "Swin3D_T_Weights.DEFAULT",
    "swin3d_s": "Swin3D_S_Weights.DEFAULT",
    "swin3d_b": "Swin3D_B_Weights.KINETICS400_V1",
    "swin3d_b_22k": "Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1",
    "mvit_v1_b": "MViT_V1_B_Weights.DEFAULT",
    "mvit_v2_s": "MViT_V2_S_Weights.DEFAULT",
    "r2plus1d_18": "R2Plus1D_18_Weights.DEFAULT",
    "s3d": "S3D_Weights.DEFAULT",
    # The first: published networks on ResNet-50 started from weights trained in this way.
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "vit_b_16": "ViT_B_16_Weights.IMAGENET1K_V1",
    "vit_b_32": "ViT_B_32_Weights.IMAGENET1K_V1",
    "vit_l_16": "ViT_L_16_Weights.IMAGENET1K_V1",
}


def load_torchvision(name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Pretrained weights of torchvision by name, through its own cache or the network, and their
    class names.

    Raises:
        UsageError: not one of ``PRETRAINED``.
        CheckpointError: neither cached nor downloadable, or the cached file is broken.
    """
    if name not in PRETRAINED:
        raise UsageError(
            f"there are no starting weights called {name!r}",
            why=f"known names: {', '.join(PRETRAINED)}",
        )
    from torchvision.models import get_weight

    weights = get_weight(PRETRAINED[name])
    classes = list(weights.meta["categories"])
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if cached.is_file():
        return load_state_file(cached), classes
    try:
        # By default torch.hub would run what is pickled in the file.
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_only_tensors(cached, error) from error
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights {name} are neither at {cached} nor reachable",
            why=str(error),
            fix=f"curl -L --create-dirs -o {shlex.quote(str(cached))} {weights.url}   "
            "# or fetch it elsewhere and pass the file: init.weights=PATH",
        ) from error
    return state, classes
