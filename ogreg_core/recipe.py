"""The recipe: everything that is learnt, in one typed, validated, printable and hashable place.

A recipe is a TOML file. Values come from, in rising order: the built-in defaults, the file named by
``extends``, the file itself, flags, and ``dotted.key=value`` overrides in TOML grammar. Unknown keys and
wrong types are refused, all at once, before anything heavy is imported: this module must not import
torch.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.errors import UsageError
from ogreg_core.models.registry import check_options, find_model, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = ["LoadedRecipe", "Recipe", "builtin_recipes", "load_recipe", "parse_model_options"]


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
        "", description="name that `ogreg prepare` remembers; `demo` is rendered when missing"
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


class ModelTable(Table):
    """Which network."""

    name: str = Field("ogreg-t", description="see `ogreg models`")
    drop_path: Rate = Field(0.1, description="stochastic depth of the last block")
    dropout: Rate = Field(0.0, description="before the classifier")
    options: dict[str, Any] = Field({}, description='architecture choices, e.g. stem = "patch"')

    @model_validator(mode="after")
    def _exists(self) -> ModelTable:
        try:
            find_model(self.name)
            check_options(self.name, self.options)
        except UsageError as error:
            raise ValueError(f"{error.what}; {error.why}") from None
        return self


class InitTable(Table):
    """Starting weights."""

    weights: str = Field(
        "", description="file, or a torchvision name such as swin_t; empty: from scratch"
    )


class TrainTable(Table):
    """Optimisation: AdamW, linear warm-up, cosine to `min_lr`."""

    epochs: Positive = Field(30, description="passes over the training split")
    batch_size: Positive = Field(
        8, description="videos per optimiser step; it sees augment.repeats clips of each"
    )
    lr: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
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
    max_unreadable: Share = Field(
        0.01, description="share of an epoch's videos that may fail before training stops"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on CUDA devices that have it, fp32 elsewhere"
    )

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainTable:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr:g} is above lr {self.lr:g}")
        return self


class EvalTable(Table):
    """Test protocol, during training and for `ogreg eval`."""

    clips: Positive = Field(1, description="clips per video, spread over time")
    crops: Literal[1, 3] = Field(1, description="crops per clip")
    every: Positive = Field(
        1, description="epochs between validations; the last epoch always validates"
    )


class Recipe(Table):
    """A whole experiment."""

    seed: int = Field(0, description="of weights, order, sampling and augmentation")
    data: DataTable = DataTable()
    augment: AugmentTable = AugmentTable()
    model: ModelTable = ModelTable()
    init: InitTable = InitTable()
    train: TrainTable = TrainTable()
    eval: EvalTable = EvalTable()

    @model_validator(mode="after")
    def _crop_fits(self) -> Recipe:
        low = self.augment.short_side[0]
        if 0 < low < self.data.size:
            raise ValueError(f"augment.short_side {low} is smaller than data.size {self.data.size}")
        mixes = self.augment.mixup or self.augment.cutmix
        if mixes and self.train.batch_size * self.augment.repeats == 1:
            raise ValueError("mixup and cutmix need at least two clips in a step")
        return self

    def to_toml(self) -> str:
        """The recipe as a file that loads to the same recipe."""
        return tomli_w.dumps(self.model_dump())

    @property
    def sha256(self) -> str:
        """Hash of the resolved content, independent of file layout."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where each value came from.

    Args:
        name: file name without ending; names the run folder.
        recipe: the validated content.
        origins: ``built-in``, a file name, ``flag`` or ``override`` by dotted key.
    """

    name: str
    recipe: Recipe
    origins: dict[str, str]

    def annotated(self) -> str:
        """The resolved recipe as valid TOML with the origin of every value in a comment."""
        return "\n".join(_annotate(self.recipe.model_dump(), self.origins)) + "\n"


def _annotate(
    values: Mapping[str, Any], origins: Mapping[str, str], prefix: str = ""
) -> Iterator[str]:
    for key, value in values.items():
        if not isinstance(value, dict):
            # tomli_w spreads arrays over lines; one line leaves room for the comment.
            text = " ".join(line.strip() for line in tomli_w.dumps({key: value}).splitlines())
            yield f"{text}  # {origins.get(prefix + key, 'built-in')}"
    for key, value in values.items():
        if isinstance(value, dict):
            yield f"\n[{prefix}{key}]"
            yield from _annotate(value, origins, f"{prefix}{key}.")


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_recipes", here.parent / "recipes"):  # installed wheel, source tree
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    return {}


def load_recipe(
    path: str, overrides: Sequence[str] = (), flags: Sequence[str] = ()
) -> LoadedRecipe:
    """Read, merge, override and validate.

    Args:
        path: a file, or the name of a built-in recipe, with or without ``recipes/`` and ``.toml``.
        overrides: ``dotted.key=value`` each, value in TOML grammar.
        flags: the same, from command-line flags; overrides win over them.

    Raises:
        UsageError: missing file, broken TOML, unknown keys, wrong types; lists all problems.
    """
    file = _find_recipe(path)
    origins: dict[str, str] = {}
    values = _read_with_extends(file, origins, ())
    changes = [*((text, "flag") for text in flags), *((text, "override") for text in overrides)]
    problems = [
        problem
        for text, origin in changes
        if (problem := _apply_override(text, values, origins, origin))
    ]
    problems += [f"{key}: {text}" for key, text in _unknown_keys(values, Recipe)]
    if not problems:
        try:
            return LoadedRecipe(file.stem, Recipe.model_validate(values), origins)
        except ValidationError as error:
            problems = list(_explain(error))
    raise UsageError(
        f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in recipe {file}",
        why="\n".join(problems),
        fix=f"ogreg train {path} --print-recipe shows all keys of a valid recipe",
    )


def _find_recipe(path: str) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    builtin = builtin_recipes()
    named_so = file.suffix in ("", ".toml") and file.parent.as_posix() in (".", "recipes")
    if named_so and file.stem in builtin:
        return builtin[file.stem]
    hint = nearest(file.stem, builtin)
    raise UsageError(
        f"there is no recipe {path}",
        why=hint or f"built-in recipes: {', '.join(builtin)}",
        fix="give the path of a TOML file or the name of a built-in recipe",
    )


def _read_with_extends(
    file: Path, origins: dict[str, str], seen: tuple[Path, ...]
) -> dict[str, Any]:
    if file.resolve() in seen:
        raise UsageError(
            f"recipe {file} extends itself", where=" -> ".join(map(str, (*seen, file)))
        )
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {file} is not valid TOML", why=str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {file} cannot be read", why=str(error)) from error
    base: dict[str, Any] = {}
    if "extends" in values:
        parent = values.pop("extends")
        if not isinstance(parent, str):
            raise UsageError(f"recipe {file}: extends must be the path of one recipe")
        base = _read_with_extends(file.parent / parent, origins, (*seen, file.resolve()))
    _merge(base, values)
    origins.update(dict.fromkeys(_leaves(values), file.name))
    return base


def _merge(base: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _apply_override(text: str, values: dict[str, Any], origins: dict[str, str], origin: str) -> str:
    """Set one ``dotted.key=value``; returns a problem or nothing."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        return f"{text}: not of the form key=value"
    annotation = _annotation(key)
    wants_text = annotation is str or _is_words(annotation)
    parsed = value.strip("\"'") if wants_text else _parse_value(value)
    table = values
    *tables, leaf = key.split(".")
    for name in tables:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            return f"{key}: {name} is not a table"
    table[leaf] = parsed
    origins[key] = origin
    return ""


def _parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string, and the schema then says whether a string will do."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def parse_model_options(model: str, texts: Sequence[str]) -> dict[str, Any]:
    """Architecture options from ``key=value`` texts.

    Raises:
        UsageError: not of that form, or not an option of the model.
    """
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text!r} is not of the form key=value", fix="--option stem=patch")
        options[key] = _parse_value(value)
    check_options(model, options)
    return options


def _is_words(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and all(
        isinstance(word, str) for word in get_args(annotation)
    )


def _annotation(key: str) -> Any:
    """The declared type of a dotted key, None if unknown."""
    model: Any = Recipe
    for name in key.split("."):
        fields = getattr(model, "model_fields", {})
        if name not in fields:
            return None
        model = fields[name].annotation
    return model


def _unknown_keys(
    values: Mapping[str, Any], model: type[BaseModel], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            yield (
                f"{prefix}{key}",
                f"no such key; {_nearest_key(prefix + key) or 'see --print-recipe'}",
            )
        elif (
            isinstance(value, dict)
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        ):
            yield from _unknown_keys(value, field.annotation, f"{prefix}{key}.")


def _nearest_key(key: str) -> str:
    """Compare the last part first (a right key in a wrong table), then the whole."""
    everything = list(_all_keys(Recipe))
    same_leaf = [known for known in everything if known.split(".")[-1] == key.split(".")[-1]]
    return f"did you mean {same_leaf[0]!r}?" if same_leaf else nearest(key, everything)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _explain(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        given = problem.get("input")
        shown = f" (got {given!r})" if not isinstance(given, dict) else ""
        yield f"{key}: {message}{shown}"
