"""Where in a model its parameters, multiply-adds and activations are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ogreg_core.profiling.counting import FlopReport, Observation, paths_to

__all__ = ["OWN", "ModuleCost", "module_costs"]

# What a module does and holds itself, beside its parts.
OWN = "(own)"


@dataclass(frozen=True)
class ModuleCost:
    """A module with all that is inside it.

    Args:
        name: its path in the model; ``PATH.(own)`` for what a module does beside its parts.
        type: class name; ``functional`` for the latter.
        depth: 1 for the parts of the model. Lists of modules, and containers of more than one stage,
            are no level of their own.
        params: number of parameters.
        multiply_adds, activations: of one clip, see :class:`FlopReport` and :class:`Observation`.
    """

    name: str
    type: str
    depth: int
    params: int
    multiply_adds: int
    activations: int

    @property
    def is_empty(self) -> bool:
        """Whether it costs nothing at all."""
        return not (self.params or self.multiply_adds or self.activations)


def module_costs(
    model: nn.Module, flops: FlopReport, seen: Observation, depth: int = 1
) -> list[ModuleCost]:
    """Modules down to a depth in the order in which they run, each in front of its parts.

    The parts of a module add up to it, those of depth 1 to the whole; modules that cost nothing are
    left out.

    Args:
        model: what was counted.
        flops, seen: of one pass.
        depth: levels, from 1.
    """
    ledger = _Ledger(
        params=_parameters_by_module(model),
        multiply_adds={**flops.by_module, "": flops.total},
        activations=seen.activations,
        order=_order_with_containers(seen.order),
        transparent=_no_levels(model, seen),
    )
    return [row for row in ledger.parts("", model, 1, depth) if not row.is_empty]


@dataclass(frozen=True)
class _Ledger:
    params: Mapping[str, int]
    multiply_adds: Mapping[str, int]
    activations: Mapping[str, int]
    order: Mapping[str, int]
    transparent: frozenset[str]

    def parts(self, name: str, module: nn.Module, level: int, depth: int) -> Iterator[ModuleCost]:
        """Rows of what is inside a module, and of what it does besides."""
        children = sorted(self._children(name, module), key=lambda item: self.order[item[0]])
        if level > depth or not children:
            return
        own = self._figures(name)
        for path, child in children:
            figures = self._figures(path)
            own = [whole - part for whole, part in zip(own, figures, strict=True)]
            yield ModuleCost(path, type(child).__name__, level, *figures)
            yield from self.parts(path, child, level + 1, depth)
        yield ModuleCost(_join(name, OWN), "functional", level, *own)

    def _children(self, name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The nearest modules inside that do something, or hold what does, and are a level."""
        for key, child in module.named_children():
            path = _join(name, key)
            if path in self.order and path not in self.transparent:
                yield path, child
            else:
                yield from self._children(path, child)

    def _figures(self, name: str) -> list[int]:
        return [kind.get(name, 0) for kind in (self.params, self.multiply_adds, self.activations)]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _parameters_by_module(model: nn.Module) -> Counter[str]:
    """Of each module with all inside it; a parameter that is shared counts at its first place."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        for path in paths_to(name.rpartition(".")[0]):
            found[path] += parameter.numel()
    return found


def _order_with_containers(order: Mapping[str, int]) -> dict[str, int]:
    """The place of the first call in a module, for those that are never called themselves, too."""
    found: dict[str, int] = {}
    for name, place in sorted(order.items(), key=lambda item: item[1]):
        for path in paths_to(name):
            found.setdefault(path, place)
    return found


def _no_levels(model: nn.Module, seen: Observation) -> frozenset[str]:
    """Lists that are never called, and modules around the blocks of more than one stage."""
    stages = cast(Any, model).stage_blocks() if hasattr(model, "stage_blocks") else []
    stage_of = {block: number for number, blocks in enumerate(stages) for block in blocks}
    return frozenset(
        name
        for name, module in model.named_modules()
        if (isinstance(module, (nn.ModuleList, nn.ModuleDict)) and name not in seen.order)
        or len({stage_of[inner] for inner in module.modules() if inner in stage_of}) > 1
    )
