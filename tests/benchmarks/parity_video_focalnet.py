"""Video-FocalNet against outputs of the authors' code: ``python tests/benchmarks/parity_video_focalnet.py
FOLDER`` with the folder of reference files; prints the largest differences, exit status 1 beyond tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from ogreg_core.models.video_focalnet import (
    Stage,
    VideoFocalNet,
    VideoFocalNetConfig,
    map_video_focalnet,
)

TOLERANCE = 2e-5

# The authors' names of flags, where ours are others.
FLAGS = {
    "tubelet_size": "tubelet",
    "focal_factor": "focal_factor",
    "use_conv_embed": "conv_embed",
    "use_layerscale": "layerscale",
    "use_postln": "postln",
    "use_postln_in_modulation": "postln_in_modulation",
    "normalize_modulator": "normalize_modulator",
}
# Of these the network does not depend on the value, or the state dict carries it.
IDLE = {"num_classes", "num_frames", "img_size", "layerscale_value", "drop_path_rate"}


def config_of(info: dict[str, Any]) -> VideoFocalNetConfig:
    """The authors' construction arguments as our configuration; others than known are refused."""
    known = {name.removeprefix("cfg/"): value for name, value in info.items()}
    width = known.pop("embed_dim")
    depths = known.pop("depths")
    levels = known.pop("focal_levels", [2] * len(depths))
    windows = known.pop("focal_windows", [3] * len(depths))
    stages = tuple(
        Stage(width << i, depth, level, window)
        for i, (depth, level, window) in enumerate(zip(depths, levels, windows, strict=True))
    )
    flags = {FLAGS[name]: known.pop(name) for name in FLAGS if name in known}
    if unknown := set(known) - IDLE:
        raise SystemExit(f"no counterpart of {', '.join(sorted(unknown))}")
    return VideoFocalNetConfig(stages, **flags)


def _tokens(x: Tensor) -> Tensor:
    return rearrange(x, "b t h w c -> (b t) (h w) c")


@torch.no_grad()
def stage_outputs(model: VideoFocalNet, clip: Tensor) -> list[Tensor]:
    """The authors' intermediate results: after the stem, and after each stage with its downsampling."""
    after_stages = model.forward_stages(clip)
    stem = model.stem(rearrange(clip, "b c t h w -> b t h w c"))
    merged = [merge(x) for merge, x in zip(model.merges, after_stages[:-1], strict=True)]
    return [_tokens(x) for x in (stem, *merged, after_stages[-1])]


def check(folder: Path) -> list[tuple[str, str, float, float]]:
    """Compare every reference file of Video-FocalNet.

    Args:
        folder: holds ``video_focalnet_*.safetensors``.

    Returns:
        File, quantity, largest absolute difference, tolerance.
    """
    found = []
    for path in sorted(folder.glob("video_focalnet_*.safetensors")):
        with safe_open(path, "pt") as file:
            info = json.loads(file.metadata()["info"])
            data = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = {k.removeprefix("state_dict/"): v for k, v in data.items() if "state_dict/" in k}
        model = VideoFocalNet(config_of(info), len(data["output"][0])).eval()
        model.load_state_dict(map_video_focalnet(state))
        clip = rearrange(data["input"], "b t c h w -> b c t h w")
        with torch.no_grad():
            ours = {"output": model(clip)}
        ours |= {f"stage_feats/{i}": x for i, x in enumerate(stage_outputs(model, clip))}
        for name, value in ours.items():
            difference = (value - data[name]).abs().max().item()
            found.append((path.name, name, difference, TOLERANCE))
    return found


def main() -> None:
    """Print one line per quantity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    results = check(parser.parse_args().folder)
    for name, quantity, difference, tolerance in results:
        print(f"{name}  {quantity}  {difference:.2e}  (within {tolerance:.0e})")  # noqa: T201
    if not results or any(difference > tolerance for *_, difference, tolerance in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
