"""MDConv as the models have it beside a plain formulation, a depthwise conv3d, and copying its features.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/mdconv.py [--frames 16] [--batch 1]
[--device cuda] [--dtype bf16]``. Features of ogreg-t's four stages, forward, and forward with backward, all
ways in turn in each round, medians. The floor is what memory alone would take: features are read and written
once forward (one copy); backward, features and gradients are read and gradients written (one and a half
copies more). Features that fit into a cache are copied faster than they could be from memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ogreg_core.models.mdconv import MDConv
from ogreg_core.models.ogreg import VARIANTS
from ogreg_core.profiling import measure_in_turn
from tests.benchmarks.record import build_parser, finish

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Copies of the features that a pass must make at least.
FORWARD_COPIES, BACKWARD_COPIES = 1.0, 1.5


class PlainMDConv(nn.Module):
    """The definition, written down: a cosine, a sigmoid, three 2-D convolutions, sums out of place.

    Args:
        own: whose parameters are used.
    """

    def __init__(self, own: MDConv) -> None:
        super().__init__()
        self.weight, self.bias = own.weight, own.bias
        self.sharpness, self.offset = own.sharpness, own.offset

    def forward(self, y: Tensor) -> Tensor:
        d = 1 - F.cosine_similarity(y[:, :-1], y[:, 1:], dim=-1).unsqueeze(-1)
        floor = torch.sigmoid(self.offset)
        m = (torch.sigmoid(self.sharpness * d + self.offset) - floor) / (1 - floor)
        before, now, after = (self.tap(y, index) for index in range(3))
        none = torch.zeros_like(y[:, :1])
        return (
            now
            + self.bias
            + torch.cat([none, m * before[:, :-1]], dim=1)
            + torch.cat([m * after[:, 1:], none], dim=1)
        )

    def tap(self, y: Tensor, index: int) -> Tensor:
        """All frames under one temporal slice of the kernel."""
        images = rearrange(y, "b t h w c -> (b t) c h w")
        out = F.conv2d(images, self.weight[:, :, index], padding=1, groups=y.shape[-1])
        return rearrange(out, "(b t) c h w -> b t h w c", b=len(y))


class DepthwiseConv3d(nn.Module):
    """What MDConv is without its modulation, by torch's operator for it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, y: Tensor) -> Tensor:
        out = self.conv(rearrange(y, "b t h w c -> b c t h w"))
        return rearrange(out, "b c t h w -> b t h w c")


def ways_at(dim: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules that are compared, the first two with the same parameters."""
    torch.manual_seed(0)
    own = MDConv(dim)
    nn.init.normal_(own.weight, std=0.3)
    ways = {"MDConv": own, "plain": PlainMDConv(own), "depthwise conv3d": DepthwiseConv3d(dim)}
    return {name: way.to(device, dtype) for name, way in ways.items()}


def check_agreement(ways: dict[str, nn.Module], y: Tensor) -> None:
    """Only what computes the same may be compared.

    Raises:
        AssertionError: MDConv and its plain formulation do not.
    """
    rounding = torch.finfo(y.dtype).eps * 200
    with torch.no_grad():
        torch.testing.assert_close(
            ways["MDConv"](y), ways["plain"](y), rtol=rounding, atol=rounding
        )


def both_ways(module: nn.Module, y: Tensor, gradient: Tensor) -> None:
    """Forward and backward, for the features and all parameters."""
    wanted = [y, *module.parameters()]
    torch.autograd.grad(module(y), wanted, gradient)


def compare_stage(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """Rows of one stage: every way forward, and forward with backward.

    Args:
        shape: of the features, ``[B, T, H, W, C]``.
        device, dtype, repeats: how to measure.
    """
    # Close to each other from frame to frame, as features are.
    still = torch.randn(shape[0], 1, *shape[2:])
    y = (still + 0.2 * torch.randn(shape)).to(device, dtype)
    ways = ways_at(shape[-1], device, dtype)
    check_agreement(ways, y)
    copy = partial(torch.empty_like(y).copy_, y)
    asked = y.clone().requires_grad_()
    forward: dict[str, Callable[[], Any]] = {n: partial(way, y) for n, way in ways.items()}
    both: dict[str, Callable[[], Any]] = {
        n: partial(both_ways, way, asked, torch.ones_like(y)) for n, way in ways.items()
    }
    rows = []
    for what, passes, copies in (
        ("forward", forward, FORWARD_COPIES),
        ("forward and backward", both, FORWARD_COPIES + BACKWARD_COPIES),
    ):
        with torch.set_grad_enabled(passes is both):
            timings = measure_in_turn({**passes, "copy": copy}, device, repeats)
        floor = copies * timings["copy"].median_ms
        for name in ways:
            median = timings[name].median_ms
            rows.append(
                {
                    "shape": "x".join(map(str, shape)),
                    "what": what,
                    "way": name,
                    "ms_p50": median,
                    "times_MDConv": median / timings["MDConv"].median_ms,
                    "times_floor": median / floor,
                    "copy_gb_per_s": 2 * y.nbytes / timings["copy"].median_ms / 1e6,
                }
            )
    return rows


def stage_shapes(frames: int, size: int, batch: int) -> list[tuple[int, ...]]:
    """Features of ogreg-t's stages for a clip of ``frames`` x ``size`` x ``size``."""
    return [
        (batch, (frames + 1) // 2, size // (4 << number), size // (4 << number), stage.dim)
        for number, stage in enumerate(VARIANTS["t"].stages)
    ]


def run(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """All stages."""
    shapes = stage_shapes(options.frames, options.size, options.batch)
    dtype = DTYPES[options.dtype]
    return [row for s in shapes for row in compare_stage(s, device, dtype, options.repeats)]


def main() -> None:
    """Measure and record."""
    parser = build_parser(__doc__, repeats=9)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    options = parser.parse_args()
    device = torch.device(options.device)
    finish("mdconv", options, run(options, device), device)


if __name__ == "__main__":
    main()
