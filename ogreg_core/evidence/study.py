"""A study: which rows are trained on equal terms, and within which budget.

A study is a TOML file. It names an ordinary recipe that all rows share, the budget in clips, the seeds
and a grid of learning rates, and for each row what it changes in the recipe. This module must not
import torch: usage errors come before anything heavy.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ogreg_core.errors import UsageError
from ogreg_core.models.registry import nearest
from ogreg_core.recipe import Recipe, builtin_recipes, find_built_in, load_recipe
from ogreg_core.recipe_tables import Positive, Share, Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

__all__ = [
    "Control",
    "Row",
    "Study",
    "Tuning",
    "best_rate",
    "builtin_studies",
    "clips_per_epoch",
    "load_study",
]

Control = Literal["shuffled", "reversed", "middle", "half", "double", "irregular"]
Rate = Annotated[float, Field(gt=0)]
# Set by the study for every row alike, so no row may.
_SHARED = (
    "seed",
    "data.",
    "augment.",
    "eval.",
    "train.batch_size",
    "train.epochs",
    "train.warmup_epochs",
    "train.lr",
    "train.lr_scaling",
    "train.reference_batch",
    "train.head_lr",
    "train.backbone_lr",
    "train.min_lr",
    "train.accumulate",
    "train.ema",
    "train.precision",
)


class Row(Table):
    """One row of the table: a model with its settings."""

    name: str = Field(description="of the row, unique")
    note: str = Field("", description="what tells it from others, such as its stem")
    changes: list[str] = Field(
        [], description="key=value of the recipe, as `ogreg train` takes them"
    )
    lr: Annotated[float, Field(ge=0)] = Field(0.0, description="given instead of tuned; 0: tuned")
    lr_of: str = Field("", description="the row whose learning rate it takes; empty: its own")
    against: str = Field(
        "",
        description="a row that it is compared with beside the reference, as one of the same stem",
    )

    @model_validator(mode="after")
    def _fair(self) -> Row:
        if "," in self.name:
            raise ValueError(f"row {self.name!r}: commas stand between names in --rows")
        if self.lr and self.lr_of:
            raise ValueError(f"row {self.name!r} has both lr and lr_of")
        return self


class Tuning(Table):
    """How learning rates are chosen: on clips held out of the training split, never on the test."""

    lrs: Annotated[list[Rate], Field(min_length=1)] = Field(description="the grid, for all rows")
    first: list[Rate] = Field(
        [],
        description="rates of the grid that are tried first; then the next one outwards as long as the "
        "best lies at an end of what was tried, or the rest where none is better than chance; empty: all",
    )
    clips: Positive = Field(description="seen by each training of the grid")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="share of each class's training videos"
    )
    seed: int = Field(100, description="of these trainings, none of the study's seeds")
    each: bool = Field(
        False, description="on each data set by itself; false: on the first, for all of them"
    )

    @model_validator(mode="after")
    def _neighbours(self) -> Tuning:
        grid = sorted(self.lrs)
        if len(set(grid)) < len(grid):
            raise ValueError("a rate stands twice in lrs")
        if self.first and sorted(self.first) not in (
            grid[low : low + len(self.first)] for low in range(len(grid))
        ):
            raise ValueError(f"first {self.first} are not neighbours in lrs {grid}")
        return self

    def reached(
        self,
        scores: Mapping[float, tuple[float, float] | None],
        at_chance: Collection[float] = (),
    ) -> list[float]:
        """The rates that the search asks for, in order; it has ended when each of them has been tried.
        Scores of other rates change nothing.

        Args:
            scores: of what was tried, the higher the better; None where a training failed.
            at_chance: those with a score that is no better than chance.
        """
        grid = sorted(self.lrs)
        low, high = (grid.index(end(self.first or grid)) for end in (min, max))
        while True:
            found = grid[low : high + 1]
            if any(lr not in scores for lr in found) or found == grid:
                return found
            # Nothing could be trained, or learnt anything, so that there is no way up: perhaps elsewhere.
            if all(scores[lr] is None or lr in at_chance for lr in found):
                return grid
            best = best_rate({lr: scores[lr] for lr in found})
            if best == grid[low] and low > 0:
                low -= 1
            elif best == grid[high] and high < len(grid) - 1:
                high += 1
            else:
                return found


def best_rate(scores: Mapping[float, tuple[float, float] | None]) -> float | None:
    """The rate with the highest score, the lower one of equals; None where all failed."""
    done = {lr: score for lr, score in sorted(scores.items()) if score is not None}
    return max(done, key=lambda lr: done[lr]) if done else None


class Study(Table):
    """Rows, and the terms that are equal for all of them."""

    title: str
    recipe: str = Field(description="shared by all rows; a path from the study's file")
    clips: Positive = Field(description="seen by each training")
    warmup: Share = Field(0.1, description="share of the training in which the rate rises")
    seeds: Annotated[list[int], Field(min_length=1)] = Field(description="one training each")
    reference: str = Field(description="the row that others are compared with")
    controls: list[Control] = Field(
        ["shuffled", "middle"],
        description="tests beside the plain one, as of `ogreg eval --frame-order`",
    )
    judged: list[Control] = Field(
        [], description="controls under which rows are compared with the reference, too"
    )
    tuning: Tuning
    rows: Annotated[list[Row], Field(min_length=1)]

    @model_validator(mode="after")
    def _whole(self) -> Study:
        names = [row.name for row in self.rows]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"rows called the same: {', '.join(sorted(twice))}")
        for name in (self.reference, *(row.lr_of for row in self.rows if row.lr_of)):
            if name not in names:
                raise ValueError(f"there is no row {name!r}; {nearest(name, names) or names}")
        for row in self.rows:
            if row.against and (row.against not in names or row.against == row.name):
                close = nearest(row.against, names) or names
                raise ValueError(f"row {row.name!r} is against {row.against!r}; {close}")
            if row.against == self.reference:
                raise ValueError(f"row {row.name!r}: all rows are against the reference")
        if any(self.row(row.lr_of).lr_of for row in self.rows if row.lr_of):
            raise ValueError("a row takes its rate from one that takes its own from another")
        if not set(self.judged) <= set(self.controls):
            raise ValueError(f"judged {self.judged} are not all among the controls")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed stands twice among the seeds")
        if self.tuning.seed in self.seeds:
            raise ValueError(f"seed {self.tuning.seed} is the tuning's own")
        return self

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    @staticmethod
    def epochs(videos: int, batch: int, clips: int) -> int:
        """How many epochs come nearest to so many clips."""
        return max(1, round(clips / clips_per_epoch(videos, batch)))

    def changes(self, row: Row, videos: int, batch: int, clips: int, lr: float) -> list[str]:
        """The overrides that make the shared recipe this row's.

        Args:
            row: whose.
            videos, batch: of the training split and of a step.
            clips: to be seen.
            lr: peak learning rate.
        """
        epochs = self.epochs(videos, batch, clips)
        return [
            *row.changes,
            f"train.epochs={epochs}",
            f"train.warmup_epochs={self.warmup * epochs:g}",
            f"train.lr={lr:g}",
            f"eval.every={epochs}",
        ]


def clips_per_epoch(videos: int, batch: int) -> int:
    """What an epoch sees: it leaves out what fills no batch."""
    return videos // batch * batch or videos


def builtin_studies() -> dict[str, Path]:
    """The studies that come with the package, by name."""
    folder = next(iter(builtin_recipes().values())).parent / "evidence"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_study(path: str) -> tuple[str, Path, Study]:
    """Read and check a study.

    Args:
        path: a file, or the name of a built-in study, with or without ``recipes/evidence/`` and
            ``.toml``.

    Returns:
        its name, the file of its recipe, and the study.

    Raises:
        UsageError: missing, not TOML, unknown keys, or rows that the recipe refuses; lists all
            problems.
    """
    file = find_built_in(path, "study", "recipes/evidence", builtin_studies())
    try:
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"study {file} cannot be read", why=str(error), fix="a built-in one shows how: models"
        ) from error
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        problems = [_problem(item) for item in error.errors()]
        raise UsageError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in study {file}",
            why="\n".join(problems),
            fix="a built-in one shows how: models",
        ) from error
    recipe = file.parent / study.recipe
    shared = load_recipe(str(recipe)).recipe
    for row in study.rows:
        _check_row(study, row, recipe, shared)
    return file.stem, recipe, study


def _check_row(study: Study, row: Row, recipe: Path, shared: Recipe) -> None:
    """Refuse a row that is no recipe, or that is trained on other terms than the rest.

    Raises:
        UsageError: says which row and why.
    """
    try:
        own = load_recipe(str(recipe), row.changes).recipe
    except UsageError as error:
        raise UsageError(f"row {row.name!r}: {error.what}", why=error.why, fix=error.fix) from error
    before, after = shared.flat(), own.flat()
    changed = [key for key in after if key.startswith(_SHARED) and after[key] != before[key]]
    if changed:
        raise UsageError(
            f"row {row.name!r} changes {', '.join(changed)}",
            why="all rows share them",
            fix=f"change them in {recipe}, for all rows",
        )


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
