"""The models by name. Importing this module does not import torch: help texts and completion read it.

Adding an architecture takes one new file and one line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "ModelEntry", "create_model", "find_model", "nearest"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelEntry:
    """What is known of a model without building it.

    Args:
        factory: ``module:function``, called with ``num_classes`` and keyword options.
        arguments: fixed arguments of this entry.
        options: what a recipe may set in ``[model.options]``: allowed words, or the length of a list
            of positive integers, by name.
        frames, size: usual input, frames and pixels.
        params_m: millions of parameters with 400 classes.
        gmacs: billions of multiply-adds of one view of the usual input.
        source: where the architecture comes from.
        mean, std: normalisation of the input per channel, for pixels in 0..1.
        fixed_input: whether frames and size are built into the network, such as by position tables;
            then the factory takes them.
        key_map: ``module:function`` from names of foreign checkpoints to this model's.
        weights: names of pretrained weights that ``init.weights`` knows for it.
        maps: what its gaze and glance maps show, by kind.
    """

    factory: str
    arguments: Mapping[str, Any]
    options: Mapping[str, tuple[str, ...] | int]
    frames: int
    size: int
    params_m: float
    gmacs: float
    source: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    fixed_input: bool = False
    key_map: str = ""
    weights: tuple[str, ...] = ()
    maps: Mapping[str, str] = field(default_factory=dict)


def _ogreg(variant: str, frames: int, size: int, params_m: float, gmacs: float) -> ModelEntry:
    return ModelEntry(
        factory="ogreg_core.models.ogreg:build_ogreg",
        arguments={"variant": variant},
        options={
            "stem": ("conv", "patch"),
            "gaze": ("modulated", "2d", "3d"),
            "similarity": ("frame", "position"),
            "strides": 4,
        },
        frames=frames,
        size=size,
        params_m=params_m,
        gmacs=gmacs,
        source="arXiv 2604.06783, reconstruction",
    )


# Figures: `ogreg profile --model NAME --classes 400`, convolutional stem; the tests compare them
# with the built model.
MODELS: dict[str, ModelEntry] = {
    "ogreg-n": _ogreg("n", 8, 112, 1.77, 0.276),
    "ogreg-t": _ogreg("t", 32, 224, 28.10, 67.2),
    "ogreg-s": _ogreg("s", 32, 224, 49.66, 127.6),
    "ogreg-b": _ogreg("b", 32, 224, 87.86, 220.8),
}


def nearest(word: str, choices: Any) -> str:
    """`` Did you mean 'x'?`` or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def find_model(name: str) -> ModelEntry:
    """The entry of a model.

    Raises:
        UsageError: no such model; names the nearest one.
    """
    try:
        return MODELS[name]
    except KeyError:
        raise UsageError(
            f"there is no model {name!r}",
            why=nearest(name.lower().replace("_", "-"), MODELS) or f"models: {', '.join(MODELS)}",
            fix="ogreg models",
        ) from None


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the model does not have, and values it does not take.

    Raises:
        UsageError: names the nearest option, or the values that would do.
    """
    known = find_model(name).options
    for option, value in options.items():
        if option not in known:
            hint = nearest(option, known)
            raise UsageError(
                f"model {name} has no option {option!r}", why=hint or f"options: {', '.join(known)}"
            )
        allowed = known[option]
        if isinstance(allowed, tuple):
            fits, wanted = value in allowed, f"one of {', '.join(allowed)}"
        else:
            fits, wanted = _is_positive_list(value, allowed), f"{allowed} positive integers"
        if not fits:
            raise UsageError(f"model option {option} is {value!r}", why=f"it must be {wanted}")


def _is_positive_list(value: Any, length: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == length
        and all(type(item) is int and item > 0 for item in value)
    )


def create_model(
    name: str,
    num_classes: int,
    *,
    frames: int | None = None,
    size: int | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    **options: Any,
) -> nn.Module:
    """Build a model with freshly initialised weights.

    Args:
        name: key of ``MODELS``.
        num_classes: size of the head.
        frames, size: of the clips, for models into which they are built; the usual ones by default.
        drop_path: stochastic depth rate of the last block.
        dropout: before the head.
        options: architecture choices, see the model's file.

    Raises:
        UsageError: unknown model or option, or a value the model refuses.
    """
    entry = find_model(name)
    check_options(name, options)
    shape = {"frames": frames or entry.frames, "size": size or entry.size}
    return _named(entry.factory)(
        num_classes=num_classes,
        drop_path=drop_path,
        dropout=dropout,
        **(shape if entry.fixed_input else {}),
        **entry.arguments,
        **options,
    )


def _named(function: str) -> Any:
    """A function by ``module:name``."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)
