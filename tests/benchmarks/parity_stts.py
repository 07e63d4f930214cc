"""Token selection against the numbers of the released code (github.com/wangjk666/STTS, commit 6ae3404).

Run by name, not by pytest: ``python tests/benchmarks/parity_stts.py FOLDER`` with the folder that
holds ``stts_*.safetensors``; exit code 1 if a difference exceeds its tolerance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from ogreg_core.models.stts import (
    AnchorSelector,
    FrameSelector,
    Perturbation,
    Scorer,
    perturbed_top_k,
    top_k,
)

# Gradients are compared as shares of their largest entry (19 to 685 in the file). The scores of the
# file's windows span 0.003 to 0.013 before they are stretched to 0..1, which stretches float32 rounding
# as well: evaluated in float64, the file's own normalised scores are 1.7e-5 off.
ROUNDED = 3e-5

Difference = tuple[str, str, float, float]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and the construction arguments of a file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["info"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return (ours.double() - theirs.double()).abs().max().item()


def scorer(path: Path) -> list[Difference]:
    """The scoring network."""
    tensors, _ = read(path)
    model = Scorer(tensors["input"].shape[-1])
    model.load_state_dict(part(tensors, "state_dict/"))
    return [
        (path.name, "output", gap(model(tensors["input"]).unsqueeze(-1), tensors["output"]), 1e-6)
    ]


def top_k_cases(path: Path) -> list[Difference]:
    """The smoothed choice and its released gradient."""
    tensors, info = read(path)
    found = []
    for case in sorted({name.split("/")[1] for name in tensors}):
        given = part(tensors, f"cases/{case}/")
        scores = given["scores"].requires_grad_()
        k, sigma = info[f"cases/{case}/k"], info[f"cases/{case}/sigma"]
        indicator = perturbed_top_k(scores, k, given["noise"], sigma, "official")
        indicator.backward(given["grad_output"])
        label = f"case {case}"
        found.append((path.name, f"{label} indicator", gap(indicator, given["indicator"]), 2e-6))
        found.append((path.name, f"{label} gradient", gap(scores.grad, given["grad_scores"]), 2e-6))
    return found


def selections(path: Path) -> list[Difference]:
    """Both selectors: choice and mixture forwards, gradients backwards."""
    tensors, info = read(path)
    found = []
    for kind in ("time", "space"):
        given = part(tensors, f"{kind}/")
        items, frames = info[f"{kind}/N"], info[f"{kind}/T"]
        side = round(items**0.5)
        x = rearrange(given["input"], "b (t h w) c -> b t h w c", t=frames, h=side).clone()
        x.requires_grad_()
        selector = (FrameSelector if kind == "time" else AnchorSelector)(
            x.shape[-1], info[f"{kind}/k"] / (frames if kind == "time" else items)
        )
        selector.load_state_dict(part(given, "state_dict/"))
        noise = given["noise"]
        if kind == "space":
            noise = rearrange(noise, "(b t) m d -> b t m d", t=frames)
        hard, scores = selector(x)
        k = info["time/k"] if kind == "time" else 1
        indices = top_k(scores.flatten(0, -2), k)
        sigma = torch.tensor(info[f"{kind}/sigma"])
        soft, _ = selector(x, Perturbation(noise, sigma, "official"))
        upstream = torch.randn(
            given["train_output"].shape,
            generator=torch.Generator().manual_seed(info[f"{kind}/grad_output_seed"]),
        )
        soft.flatten(1, 3).backward(upstream)
        pairs = [
            ("scores", scores.flatten(0, -2), given["norm_scores"]),
            ("indices", indices, given["indices"]),
            ("hard output", hard.flatten(1, 3), given["eval_output"]),
            ("soft output", soft.flatten(1, 3), given["train_output"]),
            ("input gradient", x.grad.flatten(1, 3), given["grad_input"]),
        ]
        largest = max(value.abs().max() for value in part(given, "grad_params/").values())
        for name, parameter in selector.named_parameters():
            theirs = given[f"grad_params/{name}"]
            pairs.append((f"gradient {name}", parameter.grad / largest, theirs / largest))
        for name, a, b in pairs:
            if name == "input gradient":
                a, b = a / given["grad_input"].abs().max(), b / given["grad_input"].abs().max()
            rounded = kind == "space" and ("score" in name or "gradient" in name)
            found.append((path.name, f"{kind} {name}", gap(a, b), ROUNDED if rounded else 2e-6))
    return found


def check(folder: Path) -> list[Difference]:
    """File, quantity, largest absolute difference and tolerance."""
    return [
        *scorer(folder / "stts_scorer.safetensors"),
        *top_k_cases(folder / "stts_perturbed_topk.safetensors"),
        *selections(folder / "stts_select_mvit.safetensors"),
    ]


def main() -> int:
    """Print a line per quantity."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    worst = 0
    for file, quantity, difference, tolerance in check(parser.parse_args().folder):
        good = difference <= tolerance
        worst |= not good
        print(f"{file}  {quantity}  {difference:.2e}  {'<=' if good else 'EXCEEDS'} {tolerance:g}")  # noqa: T201
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
