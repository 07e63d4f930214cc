"""Global temporal attention (gta.py) after a stage of another model.

The module belongs to the last block of the stage: it is that block's part ``gta`` and runs after it, so
that no other parameter changes its name and starting weights still fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.gta import (
    GlobalTemporalAttention,
    GTAConfig,
    matrix_names,
    run_with_maps,
)
from ogreg_core.models.protocol import BlockMaps

__all__ = ["add_gta", "insert_gta"]

Layout = Literal["last", "first"]


def add_gta(
    model: nn.Module, fields: Mapping[str, Any], frames: int, size: int, drop_path: float
) -> None:
    """:func:`insert_gta` by plain values, as recipes and checkpoints hold them.

    Args:
        model, frames, size, drop_path: see there.
        fields: ``stages``, and ``options``, fields of :class:`ogreg_core.models.gta.GTAConfig`.
    """
    config = GTAConfig(**fields["options"])
    insert_gta(
        model, fields["stages"], frames=frames, size=size, config=config, drop_path=drop_path
    )


def insert_gta(
    model: nn.Module,
    stages: Sequence[int],
    *,
    frames: int,
    size: int,
    config: GTAConfig | None = None,
    drop_path: float = 0.0,
) -> list[str]:
    """Let global temporal attention follow the last block of each of the given stages.

    The model computes what it computed until the modules have learned. It keeps the protocol: a
    module lies in the layer of its block, its matrices do not decay, its activations are recomputed
    with the block's, and ``forward_with_maps`` gives ``stage3.gta`` beside the rest.

    Args:
        model: answers the protocol ``VideoModel``; changed in place.
        stages: from 1; their last blocks give whole feature volumes.
        frames, size: input that the model is for; from now on the number of frames is fixed if
            ``config.temporal`` is ``global``.
        config: of the modules.
        drop_path: stochastic depth of each module.

    Returns:
        Prefixes of the new parameters, in the order of ``stages``.

    Raises:
        UsageError: there is no such stage, or it has a module already, or it does not end in a feature
            volume, or the configuration does not suit its channels; the model is left as it was.
    """
    ends = _last_blocks(model, stages)
    volumes = _volumes(model, ends, frames, size)
    modules = {
        number: GlobalTemporalAttention(channels, tokens, config, drop_path, layout)
        for number, (channels, tokens, layout) in volumes.items()
    }
    for number, module in modules.items():
        block = ends[number]
        module.to(next(block.parameters()).device).train(block.training)
        block.add_module("gta", module)
        block.forward = partial(_then, block.forward, module)
    _extend(model, {f"stage{number}.gta": module for number, module in modules.items()})
    names = {module: name for name, module in model.named_modules()}
    return [names[module] for module in modules.values()]


def _then(forward: Callable[..., Tensor], module: nn.Module, *arguments: Any) -> Tensor:
    return module(forward(*arguments))


def _last_blocks(model: nn.Module, stages: Sequence[int]) -> dict[int, nn.Module]:
    """The blocks to follow, by the number of their stage."""
    blocks: list[list[nn.Module]] = model.stage_blocks()  # type: ignore[operator]
    for number in stages:
        if not 1 <= number <= len(blocks):
            raise UsageError(
                f"there is no stage {number} for global temporal attention to follow",
                why=f"the model has stages 1 to {len(blocks)}",
            )
        last = blocks[number - 1][-1]
        if hasattr(last, "gta") or isinstance(last, GlobalTemporalAttention):
            raise UsageError(f"stage {number} ends in global temporal attention already")
    return {number: blocks[number - 1][-1] for number in stages}


@torch.no_grad()
def _volumes(
    model: nn.Module, ends: Mapping[int, nn.Module], frames: int, size: int
) -> dict[int, tuple[int, int, Layout]]:
    """Channels, frames and layout of what the last block of each stage gives, seen in one pass of a
    black clip.
    """
    given: dict[int, Any] = {}
    hooks = [
        block.register_forward_hook(
            lambda _module, _args, out, number=number: given.__setitem__(number, out)
        )
        for number, block in ends.items()
    ]
    training = model.training
    clip = torch.zeros(1, 3, frames, size, size, device=next(model.parameters()).device)
    try:
        model.eval()
        features: list[Tensor] = model.forward_stages(clip)  # type: ignore[operator]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    found: dict[int, tuple[int, int, Layout]] = {}
    for number in ends:
        shape = tuple(features[number - 1].shape)
        own = tuple(getattr(given[number], "shape", ()))
        if own not in (shape, (shape[0], shape[-1], *shape[1:-1])):
            raise UsageError(
                f"global temporal attention cannot follow stage {number} of this model",
                why=f"its last block gives {list(own) or type(given[number]).__name__}, "
                f"the stage {list(shape)}",
            )
        found[number] = (shape[-1], shape[1], "last" if own == shape else "first")
    return found


def _extend(model: nn.Module, modules: Mapping[str, GlobalTemporalAttention]) -> None:
    """Let the model's answers to the protocol include the modules."""
    plain: Any = model
    plain.no_weight_decay = partial(_united, plain.no_weight_decay, matrix_names(model))
    plain.forward_with_maps = partial(_more_maps, plain.forward_with_maps, modules)


def _united(plain: Callable[[], set[str]], names: set[str]) -> set[str]:
    return plain() | names


@torch.no_grad()
def _more_maps(
    plain: Callable[[Tensor], tuple[Tensor, dict[str, BlockMaps]]],
    modules: Mapping[str, GlobalTemporalAttention],
    clip: Tensor,
) -> tuple[Tensor, dict[str, BlockMaps]]:
    (logits, maps), more = run_with_maps(plain, clip, modules)
    return logits, {**maps, **more}
