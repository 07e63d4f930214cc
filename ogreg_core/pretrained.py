"""Weights that nobody on this machine has trained: those in the package, and torchvision's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ogreg_core.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from ogreg_core.checkpoint import CheckpointInfo

__all__ = [
    "BUILT_IN",
    "PUBLISHED",
    "UsualTest",
    "check_pretrained",
    "describe",
    "load_pretrained",
    "names_of",
]

# ogreg-n on the demo motions; its card lies beside it.
BUILT_IN = Path(__file__).parent / "built_in" / "demo_motions.safetensors"


@dataclass(frozen=True)
class UsualTest:
    """How weights of a model are tested; their frames and size are those of the registry.

    Args:
        sampling, stride, fps, short: see :class:`ogreg_core.data.sampling.ClipSampling`.
        resize: short side over crop.
        clips, crops: views per video.
    """

    sampling: str = "dense"
    stride: int = 2
    fps: float = 0.0
    short: str = "loop"
    resize: float = 256 / 224
    clips: int = 1
    crops: int = 1


_SWIN = UsualTest(resize=1, clips=4, crops=3)
_MVIT = UsualTest(stride=4, fps=30, short="clamp", clips=5)
_FOCALNET = UsualTest("uniform", stride=1, resize=1, clips=4, crops=3)
_XVIT = UsualTest(stride=16, fps=30, short="clamp", resize=1, crops=3)

# How Kinetics weights were tested by those who published them. torchvision resizes to 256 for Swin,
# whose authors resize to the crop for their 4x3 views.
PUBLISHED = {
    "video-focalnet-t": _FOCALNET,
    "video-focalnet-s": _FOCALNET,
    "video-focalnet-b": _FOCALNET,
    "xvit-b16": _XVIT,
    "swin3d-t": _SWIN,
    "swin3d-s": _SWIN,
    "swin3d-b": _SWIN,
    "mvit-v1-b": _MVIT,
    "mvit-v2-s": _MVIT,
    "r2plus1d-18": UsualTest(stride=1, fps=15, clips=5),
    "s3d": UsualTest(stride=1, fps=15),
}


def names_of(model: str) -> str:
    """torchvision's name of a model's weights for Kinetics-400; empty if there are none."""
    from ogreg_core.models.registry import find_model

    name = model.replace("-", "_")
    return name if name in find_model(model).weights else ""


def check_pretrained(model: str) -> str:
    """torchvision's name of a model's weights for Kinetics-400.

    Raises:
        UsageError: there are none for this model, or no such model.
    """
    from ogreg_core.models.registry import MODELS

    name = names_of(model)
    if not name:
        raise UsageError(
            f"there are no published weights of {model} for actions",
            why=f"torchvision has them for {', '.join(known for known in MODELS if names_of(known))}",
            fix="--model swin3d-t --pretrained",
        )
    return name


def describe(model: str, labels: list[str], recipe: str) -> CheckpointInfo:
    """What a checkpoint of published weights says of itself, under their published test.

    Args:
        model: key of the registry.
        labels: class names by index.
        recipe: what the weights are called.
    """
    from ogreg_core.checkpoint import CheckpointInfo
    from ogreg_core.data.sampling import ClipSampling
    from ogreg_core.models.registry import find_model

    entry, test = find_model(model), PUBLISHED.get(model, UsualTest())
    return CheckpointInfo(
        model=model,
        options={},
        labels=labels,
        sampling=ClipSampling(test.sampling, entry.frames, test.stride, test.fps, test.short),  # type: ignore[arg-type]
        size=entry.size,
        short_side=round(entry.size * test.resize),
        mean=entry.mean,
        std=entry.std,
        clips=test.clips,
        crops=test.crops,
        recipe=recipe,
    )


def load_pretrained(model: str) -> tuple[nn.Module, CheckpointInfo]:
    """A model with torchvision's weights for Kinetics-400, from its cache or the network.

    Raises:
        UsageError: there are none for this model.
        CheckpointError: neither cached nor reachable, or the cached file is broken.
    """
    from ogreg_core.errors import CheckpointError
    from ogreg_core.models.initialisation import without_random_weights
    from ogreg_core.models.registry import create_model
    from ogreg_core.models.weights import load_torchvision, map_names

    name = check_pretrained(model)
    state, labels = load_torchvision(name)
    with without_random_weights():
        built = create_model(model, len(labels))
    try:
        built.load_state_dict(map_names(model, state))
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights {name} do not fit the model {model}",
            why=str(error).split("\n\t")[0],
            fix="remove the file from torch's cache, and let it be loaded again",
        ) from error
    return built.eval(), describe(model, labels, name)
