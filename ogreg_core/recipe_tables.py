"""The tables of a recipe: every key with its type, limits, default and description.

This module must not import torch: recipes are read before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.errors import UsageError
from ogreg_core.models.registry import (
    GTA_OPTIONS,
    check_options,
    check_places,
    check_values,
    find_model,
)

__all__ = [
    "AugmentTable",
    "DataTable",
    "EvalTable",
    "InitTable",
    "ModelTable",
    "Table",
    "TrainTable",
]


class Table(BaseModel):
    """Base of all recipe tables: frozen, no unknown keys, no silent conversions from strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _refuse_idle(table: BaseModel, names: Sequence[str], when: str) -> None:
    """Refuse keys that were changed and would do nothing."""
    for name in names:
        if getattr(table, name) != type(table).model_fields[name].default:
            raise ValueError(f"{name} has no effect {when}")


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class DataTable(Table):
    """Which videos, and how a clip is taken from one."""

    dataset: str = Field(
        "",
        description="name that `ogreg prepare` remembers; demo and demo-hard are rendered if missing",
    )
    root: str = Field(
        "", description="folder of the prepared data set; empty: where `ogreg prepare` put it"
    )
    train_split: str = Field("train", description="split to learn from")
    val_split: str = Field("val", description="split to validate on")
    sampling: Literal["dense", "uniform"] = Field(
        "uniform", description="consecutive frames, or whole video in segments"
    )
    frames: Positive = Field(16, description="frames per clip")
    stride: Positive = Field(1, description="distance between frames, dense sampling only")
    fps: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="rate at which the stride counts, e.g. 30, whatever a file's; 0: its own",
    )
    short: Literal["loop", "clamp"] = Field(
        "loop", description="dense clips at the end of a short video: begin again, or hold"
    )
    size: Annotated[int, Field(ge=32)] = Field(224, description="side of the square crop, pixels")
    short_side: Annotated[int, Field(ge=32)] = Field(
        256, description="short side before test crops, pixels"
    )

    @model_validator(mode="after")
    def _crop_fits(self) -> DataTable:
        if self.short_side < self.size:
            raise ValueError(f"short_side {self.short_side} is smaller than size {self.size}")
        if self.sampling == "uniform":
            _refuse_idle(self, ("stride", "fps", "short"), 'with sampling = "uniform"')
        return self


class AugmentTable(Table):
    """Random changes to training clips; the same for all frames of a clip."""

    short_side: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(
        [0, 0], description="short side before cropping, lowest and highest; 0, 0: as stored"
    )
    inverse: bool = Field(
        False, description="draw the reciprocal of the short side evenly (PySlowFast on SSv2)"
    )
    crop: Literal["resized", "random"] = Field(
        "resized", description="a random share scaled to size, or size pixels cut out anywhere"
    )
    scale: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(
        [0.08, 1.0], description="share of the area a random crop keeps"
    )
    ratio: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        [0.75, 4 / 3], description="aspect ratio of a random crop"
    )
    flip: Literal["none", "random", "skip", "swap"] = Field(
        "none",
        description="left-right flip of half the clips; skip: not of mirror classes; swap: with their label",
    )
    color_jitter: Annotated[float, Field(ge=0)] = Field(
        0.0, description="brightness, contrast, saturation strength"
    )
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.0, description="hue strength")
    color_probability: Share = Field(1.0, description="share of clips that get these changes")
    grayscale: Share = Field(0.0, description="share of clips without colours")
    rand_augment: str = Field(
        "", description="e.g. rand-m7-n4-mstd0.5-inc1 (timm) or torchvision-n2-m9"
    )
    erasing: Share = Field(0.0, description="share of clips with a rectangle of noise")
    mixup: Annotated[float, Field(ge=0)] = Field(0.0, description="alpha of mixup; 0: off")
    cutmix: Annotated[float, Field(ge=0)] = Field(0.0, description="alpha of cutmix; 0: off")
    mix_probability: Share = Field(1.0, description="share of batches that are mixed")
    mix_switch: Share = Field(0.5, description="share of cutmix among them if both are on")
    repeats: Positive = Field(
        1, description="views of each decoded clip; a step sees batch_size x repeats"
    )

    @model_validator(mode="after")
    def _ordered(self) -> AugmentTable:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be [low, high] with 0 < low <= high")
        low, high = self.short_side
        if (low, high) != (0, 0) and not 32 <= low <= high:
            raise ValueError("short_side must be [0, 0] or [low, high] with 32 <= low <= high")
        if self.crop == "random" and low == 0:
            raise ValueError('crop = "random" needs a short_side to cut from')
        if self.inverse and low == high:
            raise ValueError("inverse needs a short_side with a range")
        parse_rand_augment(self.rand_augment)
        if self.crop == "random":
            _refuse_idle(self, ("scale", "ratio"), 'with crop = "random"')
        if not self.color_jitter and not self.hue:
            _refuse_idle(self, ("color_probability",), "without color_jitter or hue")
        if not self.mixup and not self.cutmix:
            _refuse_idle(self, ("mix_probability",), "without mixup or cutmix")
        if not self.mixup or not self.cutmix:
            _refuse_idle(self, ("mix_switch",), "unless mixup and cutmix are both on")
        return self


class KeepTable(Table):
    """One selection of tokens."""

    before: Annotated[int, Field(ge=0)] = Field(
        description="stage (MViT: block) in front of which it stands, from 0"
    )
    ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        description="share of the frames, or of each frame's positions, that is kept"
    )


class TokenSelectionTable(Table):
    """STTS: a small network scores tokens, and only the best go on; empty lists keep all."""

    time: list[KeepTable] = Field([], description="selections of frames: {before, ratio} each")
    space: list[KeepTable] = Field([], description="selections of one window per frame")
    sigma: Annotated[float, Field(gt=0)] = Field(
        0.1, description="noise on the scores at the start of training; it fades to none"
    )
    samples: Annotated[int, Field(ge=2)] = Field(500, description="noise samples per ranking")
    gradient: Literal["unbiased", "official"] = Field(
        "unbiased", description="of the smoothed choice; official: as the released code"
    )

    @model_validator(mode="after")
    def _selects(self) -> TokenSelectionTable:
        if not self:
            _refuse_idle(self, ("sigma", "samples", "gradient"), "without time or space")
        return self

    def __bool__(self) -> bool:
        return bool(self.time or self.space)


class GTATable(Table):
    """Global temporal attention as a module in another model; no stages, no modules."""

    stages: list[Positive] = Field([], description="after which stages one stands, from 1")
    options: dict[str, Any] = Field(
        {}, description="as those of gta-r50-8f but placement, e.g. regions = 0"
    )

    @model_validator(mode="after")
    def _exists(self) -> GTATable:
        try:
            check_values("gta", GTA_OPTIONS, self.options)
        except UsageError as error:
            raise ValueError(f"{error.what}; {error.why}") from None
        if not self.stages:
            _refuse_idle(self, ("options",), "without stages")
        return self


class ModelTable(Table):
    """Which network."""

    name: str = Field("ogreg-t", description="see `ogreg models`")
    drop_path: Rate = Field(0.1, description="stochastic depth of the last block")
    dropout: Rate = Field(0.0, description="before the classifier")
    options: dict[str, Any] = Field({}, description='architecture choices, e.g. stem = "patch"')
    token_selection: TokenSelectionTable = TokenSelectionTable()
    gta: GTATable = GTATable()

    @model_validator(mode="after")
    def _exists(self) -> ModelTable:
        try:
            find_model(self.name)
            check_options(self.name, self.options)
            if self.token_selection:
                check_places(self.name)
                if self.gta.stages:
                    raise UsageError(
                        "gta and token_selection do not go together",
                        why="a temporal matrix needs all frames in their places",
                    )
        except UsageError as error:
            raise ValueError(f"{error.what}; {error.why}") from None
        return self

    def architecture(self) -> dict[str, Any]:
        """Keyword arguments of :func:`ogreg_core.models.registry.create_model`."""
        arguments = dict(self.options)
        if self.token_selection:
            arguments["token_selection"] = self.token_selection.model_dump()
        if self.gta.stages:
            arguments["gta"] = self.gta.model_dump()
        return arguments


class InitTable(Table):
    """Starting weights."""

    weights: str = Field(
        "", description="file, or a name of `ogreg models` such as swin_t; empty: from scratch"
    )
    linear: Literal["own", "fan-in"] = Field(
        "own", description="random linear layers: the model's own spread, or 1 / sqrt(inputs)"
    )


class TrainTable(Table):
    """Optimisation: linear warm-up, cosine to `min_lr`."""

    epochs: Positive = Field(30, description="passes over the training split")
    batch_size: Positive = Field(
        8,
        description="videos per optimiser step, of all processes and micro-batches together; "
        "it sees augment.repeats clips of each",
    )
    accumulate: Positive = Field(
        1, description="micro-batches per step and process: less memory, the same step"
    )
    optimizer: Literal["adamw", "sgd", "nesterov"] = Field(
        "adamw", description="AdamW, or SGD with momentum, plain or Nesterov's"
    )
    momentum: Rate = Field(0.9, description="of SGD")
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
    reference_batch: Annotated[int, Field(ge=0)] = Field(
        0, description="batch_size that lr and min_lr are stated for; 0: whatever it is"
    )
    lr_scaling: Literal["linear", "sqrt", "none"] = Field(
        "linear", description="how they follow batch_size / reference_batch"
    )
    head_lr: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor on the learning rate of the classifier"
    )
    backbone_lr: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor on the learning rate of everything else"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="factor per layer, from the classifier down to the stem"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(0.0, description="learning rate at the end")
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(
        2.5, description="linear rise from lr / 100"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.05, description="none on norms, biases, MDConv's a and b"
    )
    clip_grad: Annotated[float, Field(ge=0)] = Field(
        5.0, description="largest gradient norm; 0: no clipping"
    )
    label_smoothing: Rate = Field(0.0, description="share of the target spread over all classes")
    ema: Rate = Field(
        0.0, description="decay of the weights' moving average, which is validated and kept; 0: off"
    )
    max_unreadable: Share = Field(
        0.01, description="share of an epoch's videos that may fail before training stops"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on CUDA devices that have it, fp32 elsewhere"
    )
    checkpoint_stages: list[Positive] = Field(
        [], description="stages whose activations are recomputed: less memory, the same step"
    )
    channels_last: bool = Field(False, description="memory layout of 3-D convolutions")
    compile: bool = Field(False, description="torch.compile: minutes at the start, faster steps")

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainTable:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        if not self.reference_batch:
            _refuse_idle(self, ("lr_scaling",), "without reference_batch")
        if self.optimizer == "adamw":
            _refuse_idle(self, ("momentum",), 'with optimizer = "adamw"')
        if self.optimizer == "nesterov" and not self.momentum:
            raise ValueError("Nesterov's step needs a momentum above 0")
        return self

    def lr_factor(self, batch: int) -> float:
        """What ``lr`` and ``min_lr`` are multiplied by for steps of so many videos."""
        if not self.reference_batch or self.lr_scaling == "none":
            return 1.0
        ratio = batch / self.reference_batch
        return ratio if self.lr_scaling == "linear" else ratio**0.5


class EvalTable(Table):
    """Test protocol, during training and for `ogreg eval`."""

    clips: Positive = Field(1, description="clips per video, spread over time")
    crops: Literal[1, 3] = Field(1, description="crops per clip")
    every: Positive = Field(
        1, description="epochs between validations; the last epoch always validates"
    )
