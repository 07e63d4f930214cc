"""Initial weights: of linear layers by their width, or none for those who load others at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["spread_by_inputs", "without_random_weights"]


def spread_by_inputs(model: nn.Module) -> None:
    """Draw the weights of all linear layers anew with standard deviation ``1 / sqrt(inputs)``, in place
    (LeCun et al., "Efficient BackProp", 1998, section 4.6), truncated at two deviations.

    Transformers for video draw them with 0.02, which is right for some thousand inputs: layers of 32 to
    256 then pass on so little that training from scratch begins with many epochs at chance. Layers that
    begin at zero on purpose stay there, those with an attribute ``keeps_its_start``, and biases.
    """
    for module in model.modules():
        if getattr(module, "keeps_its_start", False):
            continue
        if isinstance(module, nn.Linear) and bool(module.weight.any()):
            spread = 1 / math.sqrt(module.in_features)
            nn.init.trunc_normal_(module.weight, std=spread, a=-2 * spread, b=2 * spread)


# What draws; constants are cheap, and buffers are often made of them.
_DRAWING = (
    *("uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_"),
)


@contextmanager
def without_random_weights() -> Iterator[None]:
    """While active, ``torch.nn.init`` draws nothing: parameters of a model that is built hold whatever was
    in their memory.

    Drawing the weights of ogreg-t takes most of a second, which ``ogreg predict`` would wait for at each
    call. Everything else is built as ever, buffers included, which the meta device would lose. The
    functions of ``torch.nn.init`` are replaced for the whole process: build no other model meanwhile in
    another thread.
    """
    own = {name: getattr(nn.init, name) for name in _DRAWING}
    try:
        for name in _DRAWING:
            setattr(nn.init, name, _keep)
        yield
    finally:
        for name, function in own.items():
            setattr(nn.init, name, function)


def _keep(tensor: Tensor, *_arguments: Any, **_settings: Any) -> Tensor:
    return tensor
