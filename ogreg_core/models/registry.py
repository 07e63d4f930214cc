"""The models by name. Importing this module does not import torch: help texts and completion read it.

Adding an architecture takes one new file and one line here.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "GTA_OPTIONS",
    "MODELS",
    "ModelEntry",
    "check_options",
    "check_places",
    "check_values",
    "create_model",
    "find_model",
    "named_function",
    "nearest",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Allowed = tuple[str | int, ...] | int | type[int]


@dataclass(frozen=True)
class ModelEntry:
    """What is known of a model without building it.

    Args:
        factory: ``module:function``, called with ``num_classes`` and keyword options.
        arguments: fixed arguments of this entry.
        options: what a recipe may set in ``[model.options]``, by name: the values that are allowed,
            the length of a list of positive integers, or ``int`` for any integer that is not negative.
        frames, size: usual input, frames and pixels.
        params_m: millions of parameters with 400 classes.
        gmacs: billions of multiply-adds of one view of the usual input.
        source: where the architecture comes from.
        mean, std: normalisation of the input per channel, for pixels in 0..1.
        fixed_input: whether frames and size are built into the network, such as by position tables;
            then the factory takes them.
        key_map: ``module:function`` from names of foreign checkpoints to this model's.
        settings: ``module:function`` that reads options out of a foreign checkpoint.
        places: what token selection stands in front of in this model, such as ``stage``; empty if it
            has no place there.
        weights: names of pretrained weights that ``init.weights`` knows for it.
        maps: what its gaze and glance maps show, by kind.
    """

    factory: str
    arguments: Mapping[str, Any]
    options: Mapping[str, Allowed]
    frames: int
    size: int
    params_m: float
    gmacs: float
    source: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    fixed_input: bool = False
    key_map: str = ""
    settings: str = ""
    places: str = ""
    weights: tuple[str, ...] = ()
    maps: Mapping[str, str] = field(default_factory=dict)


def _ogreg(
    variant: str, frames: int, size: int, params_m: float, gmacs: float, *weights: str
) -> ModelEntry:
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
        key_map="ogreg_core.models.weights:map_swin",
        places="stage",
        weights=weights,
        maps={"gaze": "difference to neighbouring frames", "glance": "attention received"},
    )


def _ogreg_ablation(params_m: float, gmacs: float) -> ModelEntry:
    """OG-ReG of size n with choices that were measured against the model's own; for the ablation
    study.
    """
    return replace(
        _ogreg("n", 8, 112, params_m, gmacs),
        factory="ogreg_core.models.ogreg_ablation:build_ogreg_ablation",
        options={
            "stem": ("conv", "patch"),
            "strides": 4,
            "glance": ("soda", "none"),
            "gaze": (
                *("modulated", "2d", "3d", "none", "mixed", "difference", "difference-3d"),
                *("3d-repeating", "gated", "gated-2d", "emphasised", "excitation", "sigmoid"),
                *("inverse", "random", "gated-inverse", "gated-random"),
            ),
            "similarity": (
                *("position", "frame", "pooled"),
                *("centred", "relative", "excess", "channel"),
            ),
            "modulation": ("position", "frame"),
            "listens": ("features", "stem"),
            "sharpness": (30, 6, 15, 60, 120),
            "offset": (-2, -4, -1, 0, 2),
            "channels": ("own", "log", "shared", "fixed"),
            "gaze_spread": (1, 2, 4),
            "gaze_projection": ("none", "linear"),
            "fusion": ("sum", "split", "learnt"),
            "position": ("conv", "none", "rotary", "rotary-seconds"),
            "pooling": ("average", "strided"),
            "interpolation": ("bilinear", "nearest"),
            "stem_norm": ("batch", "layer"),
        },
    )


# Of a network that is thinner than its authors made it.
_SMALL = ", at the size of ogreg-n, sizes ours"


def _video_focalnet(
    variant: str, params_m: float, gmacs: float, size: int = 224, note: str = ""
) -> ModelEntry:
    return ModelEntry(
        factory="ogreg_core.models.video_focalnet:build_video_focalnet",
        arguments={"variant": variant},
        options={"tubelet": (1, 2), "stem": ("own", "conv")},
        frames=8,
        size=size,
        params_m=params_m,
        gmacs=gmacs,
        source=f"arXiv 2307.06947{note}",
        key_map="ogreg_core.models.video_focalnet:map_video_focalnet",
        maps={"gaze": "focal modulation"},
    )


GTA_OPTIONS: dict[str, Allowed] = {
    "attention": ("frame", "joint"),
    "temporal": ("global", "instance", "none"),
    "heads": int,
    "mixing": ("cross", "plain"),
    "matrix": ("raw", "softmax"),
    "bias": ("none", "frame"),
    "regions": int,
    "assignment": ("pixels", "regions"),
    "distribution": ("same", "separate"),
    "fusion": ("sum", "concat", "serial"),
    "reduction": int,
}
_WHERE = ("none", "first-half", "second-half", "odd", "all")


def _xvit(
    variant: str, params_m: float, gmacs: float, *weights: str, size: int = 224, note: str = ""
) -> ModelEntry:
    return ModelEntry(
        factory="ogreg_core.models.xvit:build_xvit",
        arguments={"variant": variant},
        options={
            "segment": int,
            "shift_divisor": int,
            "time_rows": int,
            "window": int,
            "table_size": int,
            "mixing": _WHERE,
            "summary": _WHERE,
            "aggregation": ("attention", "average"),
        },
        frames=16,
        size=size,
        params_m=params_m,
        gmacs=gmacs,
        source=f"arXiv 2106.05968{note}",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        key_map="ogreg_core.models.xvit_weights:map_xvit",
        settings="ogreg_core.models.xvit_weights:settings_of",
        weights=weights,
        maps={"glance": "attention received"},
    )


def _gta(
    variant: str,
    shape: tuple[int, int],
    params_m: float,
    gmacs: float,
    *weights: str,
    note: str = "",
) -> ModelEntry:
    return ModelEntry(
        factory="ogreg_core.models.gta_resnet:build_gta",
        arguments={"variant": variant},
        options={"placement": ("nl4",) if variant == "n" else ("nl5", "res4"), **GTA_OPTIONS},
        frames=shape[0],
        size=shape[1],
        params_m=params_m,
        gmacs=gmacs,
        source=f"arXiv 2012.08510, choices ours{note}",
        fixed_input=True,
        key_map="ogreg_core.models.gta_resnet:map_gta",
        weights=weights,
        maps={"glance": "attention received"},
    )


_KINETICS_MEAN, _KINETICS_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


def _torchvision(
    variant: str,
    shape: tuple[int, int],
    params_m: float,
    gmacs: float,
    source: str,
    *weights: str,
    options: Mapping[str, Allowed] | None = None,
    **rest: Any,
) -> ModelEntry:
    return ModelEntry(
        factory="ogreg_core.models.torchvision_models:build_torchvision",
        arguments={"variant": variant},
        options=options or {},
        frames=shape[0],
        size=shape[1],
        params_m=params_m,
        gmacs=gmacs,
        source=f"torchvision, {source}",
        key_map="ogreg_core.models.torchvision_models:map_torchvision",
        weights=weights,
        **rest,
    )


def _swin3d(
    variant: str,
    params_m: float,
    gmacs: float,
    *weights: str,
    shape: tuple[int, int] = (32, 224),
    note: str = "",
) -> ModelEntry:
    return _torchvision(
        variant,
        shape,
        params_m,
        gmacs,
        f"arXiv 2106.13230{note}",
        *weights,
        options={"window": (8, 16), "stem": ("own", "conv")},
        places="stage",
        maps={"glance": "attention received"},
    )


def _mvit(
    variant: str,
    params_m: float,
    gmacs: float,
    source: str,
    *weights: str,
    places: str = "",
    shape: tuple[int, int] = (16, 224),
) -> ModelEntry:
    return _torchvision(
        variant,
        shape,
        params_m,
        gmacs,
        source,
        *weights,
        options={"stem": ("own", "conv")},
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
        fixed_input=True,
        places=places,
        maps={"glance": "attention received"},
    )


def _convnet(
    variant: str,
    shape: tuple[int, int],
    params_m: float,
    gmacs: float,
    source: str,
    *weights: str,
) -> ModelEntry:
    return _torchvision(
        variant,
        shape,
        params_m,
        gmacs,
        source,
        *weights,
        mean=_KINETICS_MEAN,
        std=_KINETICS_STD,
        maps={"gaze": "strength of the features"},
    )


# Figures: `ogreg profile --model NAME --classes 400`, convolutional stem; the tests compare them
# with the built model.
MODELS: dict[str, ModelEntry] = {
    "ogreg-n": _ogreg("n", 8, 112, 1.77, 0.276),
    "ogreg-t": _ogreg("t", 32, 224, 28.10, 67.2, "swin_t", "swin3d_t"),
    "ogreg-s": _ogreg("s", 32, 224, 49.66, 127.6, "swin_s", "swin3d_s"),
    "ogreg-b": _ogreg("b", 32, 224, 87.86, 220.8, "swin_b", "swin3d_b", "swin3d_b_22k"),
    "ogreg-n-ablation": _ogreg_ablation(1.77, 0.276),
    "video-focalnet-n": _video_focalnet("n", 1.69, 0.255, 112, _SMALL),
    "video-focalnet-t": _video_focalnet("t", 49.55, 63.14),
    "video-focalnet-s": _video_focalnet("s", 88.74, 124.5),
    "video-focalnet-b": _video_focalnet("b", 157.39, 220.9),
    "xvit-n": _xvit("n", 1.095, 0.921, size=64, note=_SMALL),
    "xvit-b16": _xvit("b16", 93.79, 281.4, "vit_b_16"),
    "xvit-b32": _xvit("b32", 95.45, 70.73, "vit_b_32"),
    "xvit-l16": _xvit("l16", 317.37, 985.9, "vit_l_16"),
    "gta-n": _gta("n", (8, 112), 1.46, 0.700, note=_SMALL),
    "gta-r50-8f": _gta("r50", (8, 224), 31.79, 56.06, "resnet50"),
    "gta-r50-16f": _gta("r50", (16, 224), 31.91, 112.9, "resnet50"),
    "swin3d-n": _swin3d("swin3d_n", 2.40, 0.439, shape=(8, 112), note=_SMALL),
    "swin3d-t": _swin3d("swin3d_t", 28.16, 88.06, "swin3d_t", "swin_t"),
    "swin3d-s": _swin3d("swin3d_s", 49.82, 166.1, "swin3d_s", "swin_s"),
    "swin3d-b": _swin3d("swin3d_b", 88.05, 281.9, "swin3d_b", "swin3d_b_22k", "swin_b"),
    "mvit-v1-n": _mvit(
        "mvit_v1_n", 2.308, 0.366, f"arXiv 2104.11227{_SMALL}", places="block", shape=(16, 64)
    ),
    "mvit-v1-b": _mvit("mvit_v1_b", 36.61, 70.80, "arXiv 2104.11227", "mvit_v1_b", places="block"),
    "mvit-v2-n": _mvit("mvit_v2_n", 2.095, 0.307, f"arXiv 2112.01526{_SMALL}", shape=(16, 64)),
    "mvit-v2-s": _mvit("mvit_v2_s", 34.54, 64.46, "arXiv 2112.01526", "mvit_v2_s"),
    "r2plus1d-n": _convnet("r2plus1d_n", (8, 112), 1.142, 0.747, f"arXiv 1711.11248{_SMALL}"),
    "r2plus1d-18": _convnet(
        "r2plus1d_18", (16, 112), 31.51, 40.64, "arXiv 1711.11248", "r2plus1d_18"
    ),
    "s3d-n": _convnet("s3d_n", (8, 112), 1.274, 0.374, f"arXiv 1712.04851{_SMALL}"),
    "s3d": _convnet("s3d", (128, 224), 8.32, 144.5, "arXiv 1712.04851", "s3d"),
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
    check_values(f"model {name}", find_model(name).options, options)


def check_values(owner: str, known: Mapping[str, Allowed], options: Mapping[str, Any]) -> None:
    """:func:`check_options` for what ``owner`` is called and knows."""
    for option, value in options.items():
        if option not in known:
            hint = nearest(option, known)
            raise UsageError(
                f"{owner} has no option {option!r}", why=hint or f"options: {', '.join(known)}"
            )
        allowed = known[option]
        if isinstance(allowed, tuple):
            # True equals 1, and is none.
            fits = value in allowed and type(value) is not bool
            wanted = f"one of {', '.join(map(str, allowed))}"
        elif isinstance(allowed, type):
            fits, wanted = type(value) is int and value >= 0, "an integer that is not negative"
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
    token_selection: Mapping[str, Any] | None = None,
    gta: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model with freshly initialised weights.

    Args:
        name: key of ``MODELS``.
        num_classes: size of the head.
        frames, size: of the clips, for models into which they are built; the usual ones by default.
        drop_path: stochastic depth rate of the last block.
        dropout: before the head.
        token_selection: fields of :class:`ogreg_core.models.stts.Selection`, with ``time`` and
            ``space`` as lists of ``before`` and ``ratio``; None keeps all tokens.
        gta: global temporal attention after some ``stages``, with ``options`` as in
            :class:`ogreg_core.models.gta.GTAConfig`; it fixes the number of frames. None adds none.
        options: architecture choices, see the model's file.

    Raises:
        UsageError: unknown model or option, or a value the model refuses.
    """
    entry = find_model(name)
    check_options(name, options)
    shape = {"frames": frames or entry.frames, "size": size or entry.size}
    model: nn.Module = named_function(entry.factory)(
        num_classes=num_classes,
        drop_path=drop_path,
        dropout=dropout,
        **(shape if entry.fixed_input else {}),
        **entry.arguments,
        **options,
    )
    if gta is not None:
        named_function("ogreg_core.models.gta_insertion:add_gta")(
            model, gta, **shape, drop_path=drop_path
        )
    if token_selection is None:
        return model
    check_places(name)
    selecting: nn.Module = named_function("ogreg_core.models.stts_backbones:select_tokens")(
        model, token_selection
    )
    return selecting


def check_places(name: str) -> None:
    """Refuse token selection where a model has no place for it.

    Raises:
        UsageError: names the models that have one.
    """
    if not find_model(name).places:
        fitting = [other for other, entry in MODELS.items() if entry.places]
        raise UsageError(
            f"model {name} has no place for token_selection", why=f"models: {', '.join(fitting)}"
        )


def named_function(function: str) -> Any:
    """A function by ``module:name``."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)
