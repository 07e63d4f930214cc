"""X-ViT beside outputs of the authors' code, from files that lie outside the repository.

Run by name, not by pytest: ``python tests/benchmarks/parity_xvit.py FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ogreg_core.models.xvit import XViT, XViTConfig, map_xvit, settings_of

# The authors' configuration files say, as far as it does not show in the weights:
RELEASED = {
    "Kinetics/xvit_B16_16x16_k400.yaml": "NUM_SEGMENTS: 8\nSHIFT_DIV: 8\n",
    "Kinetics/xvit_B16_16x16_k600.yaml": "NUM_SEGMENTS: 8\nSHIFT_DIV: 8\n",
    "SSv2/xvit_B16_16x16.yaml": "NUM_SEGMENTS: 16\nSHIFT_DIV: 4\n",
}
TOLERANCE = 1e-5


def _load(path: Path) -> tuple[dict[str, Tensor], dict]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["info"])


def _build(state: dict[str, Tensor], info: dict) -> XViT:
    """The network that a state dict and the authors' configuration describe."""
    opts = dict(zip(info["opts"][::2], info["opts"][1::2], strict=True))
    own = map_xvit(state)
    changes = {key.removeprefix("XVIT."): value for key, value in opts.items() if "XVIT." in key}
    # The first line that names a key counts.
    cfg = "".join(f"{key}: {value}\n" for key, value in changes.items()) + RELEASED[info["yaml"]]
    config = XViTConfig(
        dim=own["cls_token"].shape[-1],
        depth=len({name.split(".")[1] for name in own if name.startswith("blocks.")}),
        heads=opts["TEMPORAL_HEAD.NUM_ATTENTION_HEADS"],
        patch=own["patch_embed.weight"].shape[-1],
        hidden=opts["TEMPORAL_HEAD.MLP_DIM"],
        **settings_of(state, cfg),
    )
    model = XViT(config, len(own["head.bias"])).eval()
    unused = {name for name in own if name.startswith("new_fc.")}
    model.load_state_dict({name: own[name] for name in own.keys() - unused}, strict=True)
    return model


@torch.inference_mode()
def check(folder: Path) -> list[tuple[str, str, float, float]]:
    """Compare every reference file of X-ViT.

    Args:
        folder: holds ``xvit_*.safetensors``.

    Returns:
        File, quantity, largest absolute difference, tolerance.
    """
    rows = []
    for path in sorted(folder.glob("xvit_*.safetensors")):
        tensors, info = _load(path)
        state = {
            name.removeprefix("state_dict/"): tensor
            for name, tensor in tensors.items()
            if name.startswith("state_dict/")
        }
        model = _build(state, info)
        frames: list[Tensor] = []
        model.norm.register_forward_hook(lambda _module, _args, out, seen=frames: seen.append(out))
        logits = model(tensors["input"].float())
        found = {"frame_cls": frames[0].flatten(0, 1), "output": logits}
        for name, ours in found.items():
            difference = (ours - tensors[name].float()).abs().max().item()
            rows.append((path.name, name, difference, TOLERANCE))
    return rows


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
