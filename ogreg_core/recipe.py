"""The recipe: everything that is learnt, in one typed, validated, printable and hashable place.

A recipe is a TOML file. Values come from, in rising order: the built-in defaults, the file named by
``extends``, the file itself, flags, and ``dotted.key=value`` overrides in TOML grammar. Unknown keys and
wrong types are refused, all at once, before anything heavy is imported: this module must not import
torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from ogreg_core.errors import UsageError
from ogreg_core.models.registry import check_options, nearest
from ogreg_core.recipe_tables import (
    AugmentTable,
    DataTable,
    EvalTable,
    InitTable,
    ModelTable,
    Table,
    TrainTable,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = [
    "NOT_LEARNT",
    "LoadedRecipe",
    "Recipe",
    "builtin_recipes",
    "find_built_in",
    "load_recipe",
    "parse_model_options",
]


# Keys that say where, how patiently and in how much memory a training runs, not what it learns.
NOT_LEARNT = {
    *("seed", "data.root", "train.max_unreadable", "train.accumulate"),
    *("train.checkpoint_stages", "train.channels_last", "train.compile"),
}


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
        clips = self.train.batch_size // self.train.accumulate * self.augment.repeats
        if mixes and clips == 1:
            raise ValueError("mixup and cutmix need at least two clips in a micro-batch")
        return self

    def to_toml(self) -> str:
        """The recipe as a file that loads to the same recipe."""
        return tomli_w.dumps(self.model_dump())

    def flat(self) -> dict[str, Any]:
        """Every value by its dotted key; lists and model options as one value each."""
        tables = self.model_dump()
        flat = {"seed": tables.pop("seed")}
        for table, values in tables.items():
            flat |= {f"{table}.{key}": value for key, value in values.items()}
        return flat

    @property
    def sha256(self) -> str:
        """Hash of the resolved content, independent of file layout."""
        return hashlib.sha256(self.to_toml().encode()).hexdigest()

    @property
    def experiment_sha256(self) -> str:
        """Hash of what is learnt: runs that agree in it, and in their data, repeat one experiment.

        The seed does not count, nor where the data lie, nor what leaves the step as it is. Only
        values that differ from the built-in ones do, so that keys of later versions change nothing.
        """
        usual = Recipe().flat()
        learnt = {
            key: value
            for key, value in self.flat().items()
            if key not in NOT_LEARNT and value != usual[key]
        }
        return hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()


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
    file = find_built_in(path, "recipe", "recipes", builtin_recipes())
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


def find_built_in(path: str, kind: str, folder: str, builtin: Mapping[str, Path]) -> Path:
    """The file that a path, or the name of one that comes with the package, means.

    Args:
        path: a file, or a name with or without ``folder`` and ``.toml``.
        kind: ``recipe`` or ``study``, for messages.
        folder: of the source tree in which the built-in ones lie.
        builtin: those by name.

    Raises:
        UsageError: there is neither; names the nearest one.
    """
    file = Path(path)
    if file.is_file():
        return file
    named_so = file.suffix in ("", ".toml") and file.parent.as_posix() in (".", folder)
    if named_so and file.stem in builtin:
        return builtin[file.stem]
    raise UsageError(
        f"there is no {kind} {path}",
        why=nearest(file.stem, builtin)
        or f"built-in {'studies' if kind == 'study' else 'recipes'}: {', '.join(builtin)}",
        fix=f"give the path of a TOML file or the name of a built-in {kind}",
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
