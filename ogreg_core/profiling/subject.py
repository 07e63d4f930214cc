"""What is profiled: a model by its description, and its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ogreg_core.checkpoint import load_model
from ogreg_core.data.transforms import to_input
from ogreg_core.errors import OgregError, UsageError, is_out_of_memory
from ogreg_core.inference import read_views
from ogreg_core.models.option_words import model_words
from ogreg_core.models.registry import create_model, find_model
from ogreg_core.profiling.counting import FlopReport, Observation, count_multiply_adds, observe
from ogreg_core.recipe import builtin_recipes, load_recipe

__all__ = ["Counts", "Subject", "ViewCount", "count_costs", "usual_views"]


@dataclass(frozen=True)
class ViewCount:
    """How many views of a video are scored.

    Args:
        clips, crops: per video, and per clip.
        origin: where that comes from, in words; empty if no protocol is known.
    """

    clips: int = 1
    crops: int = 1
    origin: str = ""

    @property
    def views(self) -> int:
        """Per video."""
        return self.clips * self.crops


@dataclass(frozen=True)
class Subject:
    """A model and its input.

    Args:
        model, options, classes: see :func:`ogreg_core.models.registry.create_model`.
        frames, size: of the clip, frames and pixels.
        checkpoint: file of its weights; empty for freshly initialised ones.
        views: how a video is tested.
        real: a clip to run on, normalised ``[1, 3, T, H, W]``; None for random numbers.
        times: when its frames appear, seconds, ``[1, T]``.
    """

    model: str
    options: Mapping[str, Any]
    classes: int
    frames: int
    size: int
    checkpoint: str = ""
    views: ViewCount = field(default_factory=ViewCount)
    real: Tensor | None = None
    times: Tensor | None = None

    @classmethod
    def fresh(
        cls,
        model: str,
        options: Mapping[str, Any],
        classes: int,
        frames: int | None = None,
        size: int | None = None,
    ) -> Subject:
        """A model of the registry; its usual input where nothing else is said."""
        entry = find_model(model)
        return cls(model, options, classes, frames or entry.frames, size or entry.size)

    @classmethod
    def trained(cls, checkpoint: str, clip: str | None = None) -> tuple[Subject, nn.Module]:
        """A model with its weights, and how it was trained and tested.

        Args:
            checkpoint: the file.
            clip: a video to run on instead of random numbers.

        Raises:
            CheckpointError: broken or not ours.
            VideoError: the video cannot be read.
        """
        built, info = load_model(checkpoint)
        views = ViewCount(info.clips, info.crops, "as in its validation")
        shape = info.sampling.frames, info.size
        subject = cls(info.model, info.options, len(info.labels), *shape, checkpoint, views)
        if clip is not None:
            # The centre view, which every protocol contains or stands around.
            found = read_views(clip, info.views(clips=1, crops=1))
            real = to_input(found.views, info.mean, info.std)
            subject = replace(subject, real=real, times=found.times)
        return subject, built

    @property
    def name(self) -> str:
        """Model and options: ``ogreg-t, stem=patch``."""
        return model_words(self.model, self.options)

    @property
    def shape(self) -> str:
        """Of a clip: ``16x224x224``."""
        return f"{self.frames}x{self.size}x{self.size}"

    def build(self) -> nn.Module:
        """The model in evaluation mode on the CPU, freshly initialised.

        Raises:
            UsageError: it cannot be built for this input.
        """
        return create_model(
            self.model, self.classes, frames=self.frames, size=self.size, **self.options
        ).eval()

    def outline(self) -> nn.Module:
        """The same without data, on the meta device."""
        with torch.device("meta"):
            return self.build()

    def clip(self, batch: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """Input: ``[B, 3, T, H, W]``, the real clip so many times, or random numbers."""
        if self.real is not None:
            return self.real.to(device).repeat(batch, 1, 1, 1, 1)
        return torch.randn(batch, 3, self.frames, self.size, self.size, device=device)


@dataclass(frozen=True)
class Counts:
    """What one clip costs, counted twice.

    Args:
        flops: by fvcore.
        seen: by torch.
        note: why torch's count needed real data; empty if it did not.
    """

    flops: FlopReport
    seen: Observation
    note: str = ""

    @property
    def difference(self) -> float:
        """Of fvcore's products from torch's, as a share of the latter."""
        return self.flops.products / self.seen.multiply_adds - 1 if self.seen.multiply_adds else 0.0


def count_costs(subject: Subject, model: nn.Module) -> Counts:
    """Count with fvcore, which needs a real pass, and with torch, which mostly needs none.

    Args:
        subject: what ``model`` was built from.
        model: on any device; left in the mode it was in.

    Raises:
        UsageError: the model does not take this input.
    """
    clip = subject.clip(device=next(model.parameters()).device)
    note = ""
    try:
        try:
            seen = observe(subject.outline(), clip.to("meta"))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # What a model does may depend on its data, which the meta device has not.
            note = f"not without data: {str(error).partition(chr(10))[0]}"
            seen = observe(model, clip)
        return Counts(count_multiply_adds(model, clip), seen, note)
    except OgregError:
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"{subject.name} does not take clips of {subject.shape}",
            why=str(error).partition("\n")[0],
            fix=f"ogreg profile --model {subject.model}",
        ) from error


def usual_views(model: str) -> ViewCount:
    """The test protocol of a model's recipe for Kinetics-400; one view where there is none."""
    recipes = [name for name in builtin_recipes() if name.startswith("kinetics400")]
    # Most are called after their model.
    recipes.sort(key=lambda name: name != f"kinetics400-{model}")
    for name in recipes:
        recipe = load_recipe(name).recipe
        if recipe.model.name == model and not recipe.model.token_selection:
            return ViewCount(recipe.eval.clips, recipe.eval.crops, f"recipe {name}")
    return ViewCount()
