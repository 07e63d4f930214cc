"""Where a model runs."""

from __future__ import annotations

import torch

from ogreg_core.errors import EnvironmentFault

__all__ = ["pick_device"]


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes CUDA where there is one.

    Raises:
        EnvironmentFault: the named device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentFault(
            f"device {name!r} is not available", why=str(error).splitlines()[0], fix="--device cpu"
        ) from error
    if device.type == "cuda" and device.index is not None:
        # Pinned memory and libraries would otherwise open a context on the first GPU as well.
        torch.cuda.set_device(device)
    return device
