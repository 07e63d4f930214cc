"""Self-describing checkpoints: safetensors with everything a model needs to be used.

Weights plus one JSON document in the file's metadata: model and options, labels, how clips are
taken and normalised, what it was trained on and what it scored. ``predict``, ``eval`` and
``visualize-gaze`` need nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ogreg_core import __version__
from ogreg_core.data.loader import FrameControl, Views
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import TestCrops
from ogreg_core.errors import CheckpointError, UsageError
from ogreg_core.files import write_atomic
from ogreg_core.models.initialisation import without_random_weights
from ogreg_core.models.registry import create_model

__all__ = ["CheckpointInfo", "load_checkpoint", "load_model", "save_checkpoint"]

_KEY = "ogreg"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Args:
        model: registry name.
        options: architecture options.
        labels: class names by index.
        sampling: how a clip's frames are picked.
        size, short_side: crop and resize in pixels.
        clips, crops: views per video of the validation that gave ``metrics``.
        mean, std: normalisation of pixels in 0..1.
        split: split of that validation.
        precision: of training and validation, as in the recipe.
        dataset: data set name.
        data_folder: manifest folder at training time.
        recipe: name of the recipe.
        recipe_sha256: hash of the resolved recipe.
        experiment_sha256: the same without the seed; runs that agree in it can be averaged.
        seed: of the training.
        epoch: finished epochs.
        role: ``best`` if it was kept because of its validation score, ``last`` if it is the latest.
        validations: so many had been made when it was kept; a best checkpoint is the best of at
            least them.
        metrics: validation figures in percent.
        version: of ogreg.
    """

    model: str
    options: dict[str, Any]
    labels: list[str]
    sampling: ClipSampling
    size: int
    short_side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    clips: int = 1
    crops: int = 1
    split: str = "val"
    precision: str = "auto"
    dataset: str = ""
    data_folder: str = ""
    recipe: str = ""
    recipe_sha256: str = ""
    experiment_sha256: str = ""
    seed: int = 0
    epoch: int = 0
    role: str = ""
    validations: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    version: str = __version__

    def views(
        self, clips: int | None = None, crops: int | None = None, control: FrameControl = "none"
    ) -> Views:
        """The test protocol; by default the one used in validation."""
        return Views(
            sampling=self.sampling,
            clips=clips or self.clips,
            crops=TestCrops(self.size, self.short_side, crops or self.crops),
            control=control,
        )

    def to_json(self) -> str:
        """The JSON document stored in the file."""
        return json.dumps({"schema": 1, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> CheckpointInfo:
        """Read the stored document.

        Raises:
            ValueError, TypeError, KeyError: not such a document.
        """
        content = json.loads(text)
        content.pop("schema")
        content["sampling"] = ClipSampling(**content["sampling"])
        for key in ("mean", "std"):
            content[key] = tuple(content[key])
        return cls(**content)


def save_checkpoint(path: Path, state: dict[str, Tensor], info: CheckpointInfo) -> None:
    """Write weights and description atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomic(
        path, lambda temporary: save_file(tensors, temporary, metadata={_KEY: info.to_json()})
    )


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], CheckpointInfo]:
    """Read weights and description.

    Raises:
        CheckpointError: missing, broken, or not written by ogreg.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path} does not exist", fix="check the path; a run folder will do too"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file",
            why=str(error),
            fix="copy or train it again",
        ) from error
    if _KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by ogreg",
            why="it holds weights without a description of model and labels",
            fix="use it as starting weights of a training: ogreg train RECIPE --init-from FILE",
        )
    try:
        return state, CheckpointInfo.from_json(metadata[_KEY])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} has a description that cannot be read", why=str(error)
        ) from error


def load_model(path: str | Path) -> tuple[nn.Module, CheckpointInfo]:
    """The model of a checkpoint in evaluation mode on the CPU, with its weights.

    Raises:
        CheckpointError: see :func:`load_checkpoint`; or weights and description do not belong
            together.
    """
    state, info = load_checkpoint(path)
    try:
        with without_random_weights():
            model = create_model(
                info.model,
                len(info.labels),
                frames=info.sampling.frames,
                size=info.size,
                **info.options,
            )
        model.load_state_dict(state)
    except (UsageError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the weights in {path} do not fit the model {info.model}",
            why=str(error).split("\n\t")[0],
            fix="use the ogreg version that wrote it: " + info.version,
        ) from error
    return model.eval(), info
