"""Our models beside outputs of the authors' code, from files that lie outside the repository.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/parity.py FOLDER`` with the folder of
reference files. Prints one table. Exit code 1 if a difference exceeds its tolerance, a file of the folder has
no check here, or one of the files that belong there is missing.

The authors' code: github.com/TalalWasim/Video-FocalNets at 39eba99, github.com/1adrianb/video-transformers
(X-ViT) at 82ca176, github.com/wangjk666/STTS at 6ae3404.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import safe_open
from torch import Tensor

from ogreg_cli.console import print_table, result
from ogreg_core.models.stts import (
    AnchorSelector,
    FrameSelector,
    Perturbation,
    Scorer,
    perturbed_top_k,
    top_k,
)
from ogreg_core.models.video_focalnet import (
    Stage,
    VideoFocalNet,
    VideoFocalNetConfig,
    map_video_focalnet,
)
from ogreg_core.models.xvit import XViT, XViTConfig
from ogreg_core.models.xvit_weights import map_xvit, settings_of

# --- files and comparisons -----------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What a reference file holds: tensors, and numbers and words of the construction, by name."""

    tensors: dict[str, Tensor]
    info: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Reference:
        """All of a file."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(tensors, json.loads(file.metadata()["info"]))

    def below(self, prefix: str) -> Reference:
        """The entries whose names begin with ``prefix``, by the rest of their names."""

        def part(entries: dict[str, Any]) -> dict[str, Any]:
            return {n.removeprefix(prefix): v for n, v in entries.items() if n.startswith(prefix)}

        return Reference(part(self.tensors), part(self.info))


@dataclass(frozen=True)
class Comparison:
    """One quantity, ours beside theirs.

    Args:
        quantity: what is compared.
        difference: largest absolute difference; infinite for unlike shapes.
        tolerance: largest difference that is let pass.
        scale: what the difference is a share of, where the tolerance is for the share.
    """

    quantity: str
    difference: float
    tolerance: float
    scale: float | None = None

    @property
    def ok(self) -> bool:
        """Within tolerance; not-a-number is not."""
        return self.difference / (self.scale or 1.0) <= self.tolerance


def compare(
    quantity: str, ours: Tensor, theirs: Tensor, tolerance: float, scale: float | None = None
) -> Comparison:
    """See :class:`Comparison`."""
    if ours.shape != theirs.shape:
        shapes = f"{quantity}, {list(ours.shape)} for {list(theirs.shape)}"
        return Comparison(shapes, math.inf, tolerance, scale)
    difference = (ours.double() - theirs.double()).abs().max().item()
    return Comparison(quantity, difference, tolerance, scale)


# --- Video-FocalNet ------------------------------------------------------------------------------

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


def video_focalnet_config(info: dict[str, Any]) -> VideoFocalNetConfig:
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
        raise SystemExit(f"Video-FocalNet: no counterpart of {', '.join(sorted(unknown))}")
    return VideoFocalNetConfig(stages, **flags)


def video_focalnet_stages(model: VideoFocalNet, clip: Tensor) -> list[Tensor]:
    """The authors' intermediate results: after the stem, and after each stage with its downsampling."""
    after_stages = model.forward_stages(clip)
    stem = model.stem(rearrange(clip, "b c t h w -> b t h w c"))
    merged = [merge(x) for merge, x in zip(model.merges, after_stages[:-1], strict=True)]
    results = (stem, *merged, after_stages[-1])
    return [rearrange(x, "b t h w c -> (b t) (h w) c") for x in results]


@torch.inference_mode()
def video_focalnet(reference: Reference, tolerance: float) -> list[Comparison]:
    """Logits and stages of a small network."""
    theirs = reference.tensors
    model = VideoFocalNet(video_focalnet_config(reference.info), theirs["output"].shape[1]).eval()
    model.load_state_dict(map_video_focalnet(reference.below("state_dict/").tensors))
    clip = rearrange(theirs["input"], "b t c h w -> b c t h w")
    ours = {"output": model(clip)}
    ours |= {f"stage_feats/{i}": x for i, x in enumerate(video_focalnet_stages(model, clip))}
    return [compare(name, value, theirs[name], tolerance) for name, value in ours.items()]


# --- X-ViT ---------------------------------------------------------------------------------------

# The authors' configuration files say, as far as it does not show in the weights:
RELEASED = {
    "Kinetics/xvit_B16_16x16_k400.yaml": "NUM_SEGMENTS: 8\nSHIFT_DIV: 8\n",
    "Kinetics/xvit_B16_16x16_k600.yaml": "NUM_SEGMENTS: 8\nSHIFT_DIV: 8\n",
    "SSv2/xvit_B16_16x16.yaml": "NUM_SEGMENTS: 16\nSHIFT_DIV: 4\n",
}


def xvit_model(state: dict[str, Tensor], info: dict[str, Any]) -> XViT:
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
    model.load_state_dict(own)
    return model


@torch.inference_mode()
def xvit(reference: Reference, tolerance: float) -> list[Comparison]:
    """Logits, and the class vector of every frame, of a small network."""
    theirs = reference.tensors
    model = xvit_model(reference.below("state_dict/").tensors, reference.info)
    frames: list[Tensor] = []
    model.norm.register_forward_hook(lambda _module, _args, out: frames.append(out))
    logits = model(theirs["input"].float())
    ours = {"frame_cls": frames[0].flatten(0, 1), "output": logits}
    return [compare(name, value, theirs[name], tolerance) for name, value in ours.items()]


# --- STTS ----------------------------------------------------------------------------------------

# The scores of the file's windows span 0.003 to 0.013 before they are stretched to 0..1, which
# stretches float32 rounding as well: beside an evaluation in float64, the file's own normalised
# scores are 1.7e-5 off, its gradients up to 2.7e-5 of the largest. The choice and the mixtures do not
# need this.
ROUNDED = 3e-5


def stts_scorer(reference: Reference, tolerance: float) -> list[Comparison]:
    """The scoring network."""
    theirs = reference.tensors
    model = Scorer(theirs["input"].shape[-1])
    model.load_state_dict(reference.below("state_dict/").tensors)
    ours = model(theirs["input"]).unsqueeze(-1)
    return [compare("output", ours, theirs["output"], tolerance)]


def stts_perturbed_topk(reference: Reference, tolerance: float) -> list[Comparison]:
    """The smoothed choice and its released gradient."""
    found = []
    for case in sorted({name.split("/")[1] for name in reference.tensors}):
        given = reference.below(f"cases/{case}/")
        theirs, k, sigma = given.tensors, given.info["k"], given.info["sigma"]
        scores = theirs["scores"].requires_grad_()
        indicator = perturbed_top_k(scores, k, theirs["noise"], sigma, "official")
        (gradient,) = torch.autograd.grad(indicator, scores, theirs["grad_output"])
        found += [
            compare(f"case {case} indicator", indicator, theirs["indicator"], tolerance),
            compare(f"case {case} gradient", gradient, theirs["grad_scores"], tolerance),
        ]
    return found


def stts_select(reference: Reference, tolerance: float) -> list[Comparison]:
    """Both selectors: hard and soft choice forwards, gradients of the soft one backwards."""
    return [
        *_selection("time", reference.below("time/"), tolerance, tolerance),
        *_selection("space", reference.below("space/"), tolerance, ROUNDED),
    ]


def _selection(
    kind: str, given: Reference, tolerance: float, score_tolerance: float
) -> Iterator[Comparison]:
    """One selector.

    Args:
        kind: ``time`` or ``space``.
        given: the part of the file.
        tolerance: for choice and mixture.
        score_tolerance: for the scores, and for the gradients as shares of the largest entry (the
            input's by itself, the parameters' together; 19 to 685 in the file).
    """
    theirs, frames = given.tensors, given.info["T"]
    x = rearrange(
        theirs["input"], "b (t h w) c -> b t h w c", t=frames, h=math.isqrt(given.info["N"])
    ).requires_grad_()
    selector, k, noise = _selector(kind, x.shape[-1], given)
    hard, scores = selector(x)
    soft, _ = selector(x, Perturbation(noise, torch.tensor(given.info["sigma"]), "official"))
    upstream = torch.randn(
        theirs["train_output"].shape,
        generator=torch.Generator().manual_seed(given.info["grad_output_seed"]),
    )
    soft.flatten(1, 3).backward(upstream)

    scores = scores.flatten(0, -2)
    yield compare(f"{kind} scores", scores, theirs["norm_scores"], score_tolerance)
    yield compare(f"{kind} indices", top_k(scores, k), theirs["indices"], tolerance)
    yield compare(f"{kind} hard output", hard.flatten(1, 3), theirs["eval_output"], tolerance)
    yield compare(f"{kind} soft output", soft.flatten(1, 3), theirs["train_output"], tolerance)
    assert x.grad is not None
    gradient, scale = x.grad.flatten(1, 3), theirs["grad_input"].abs().max().item()
    yield compare(f"{kind} gradient input", gradient, theirs["grad_input"], score_tolerance, scale)
    gradients = given.below("grad_params/").tensors
    largest = max(value.abs().max().item() for value in gradients.values())
    for name, parameter in selector.named_parameters():
        assert parameter.grad is not None
        label = f"{kind} gradient {name}"
        yield compare(label, parameter.grad, gradients[name], score_tolerance, largest)


def _selector(
    kind: str, dim: int, given: Reference
) -> tuple[FrameSelector | AnchorSelector, int, Tensor]:
    """The selector with the file's weights, how many of its ranked items it keeps, and its noise."""
    kept, frames, noise = given.info["k"], given.info["T"], given.tensors["noise"]
    selector: FrameSelector | AnchorSelector
    if kind == "time":
        selector, k = FrameSelector(dim, kept / frames), kept
    else:
        # One window of each frame, of so many tokens.
        selector, k = AnchorSelector(dim, kept / given.info["N"]), 1
        noise = rearrange(noise, "(b t) m d -> b t m d", t=frames)
    selector.load_state_dict(given.below("state_dict/").tensors)
    return selector, k, noise


# --- the folder ----------------------------------------------------------------------------------

Check = Callable[[Reference, float], list[Comparison]]

# By pattern of the file's name: its check, and the tolerance that the folder's README states. Of the
# networks more configurations may come.
CHECKS: dict[str, tuple[Check, float]] = {
    "stts_perturbed_topk.safetensors": (stts_perturbed_topk, 2e-6),
    "stts_scorer.safetensors": (stts_scorer, 1e-6),
    "stts_select_mvit.safetensors": (stts_select, 2e-6),
    "video_focalnet_*.safetensors": (video_focalnet, 2e-5),
    "xvit_*.safetensors": (xvit, 1e-5),
}
# Files that belong into the folder.
KNOWN = {
    "stts_perturbed_topk.safetensors",
    "stts_scorer.safetensors",
    "stts_select_mvit.safetensors",
    "video_focalnet_plain.safetensors",
    "video_focalnet_tubelet2.safetensors",
    "xvit_crop160.safetensors",
    "xvit_ssv2.safetensors",
}
HEADER = ("file", "quantity", "difference", "as a share", "tolerance", "stated", "")


def row(file: str, found: Comparison, stated: float) -> tuple[str, ...]:
    """Cells of a comparison, in the order of the header."""
    scale = found.scale
    return (
        file,
        found.quantity,
        f"{found.difference:.2e}",
        f"{found.difference / scale:.2e} of {scale:.3g}" if scale else "",
        f"{found.tolerance:.0e}",
        f"{stated:.0e}",
        "ok" if found.ok else "NOT",
    )


def report(folder: Path) -> bool:
    """Check every file of the folder and print the table.

    Args:
        folder: holds the reference files, and a README.

    Returns:
        Whether all are there, known, and within their tolerances.
    """
    files = {path.name: path for path in folder.iterdir() if path.name != "README.md"}
    rows: list[tuple[str, ...]] = []
    failed = compared = wider = 0
    for name in sorted(files.keys() | KNOWN):
        check, stated = next((c for p, c in CHECKS.items() if fnmatch(name, p)), (None, 0.0))
        if name not in files or check is None:
            state = "no check of this file" if name in files else "missing file"
            rows.append((name, state, "", "", "", "", "NOT"))
            failed += 1
            continue
        for found in check(Reference.read(files[name]), stated):
            rows.append(row(Path(name).stem, found, stated))
            compared += 1
            failed += not found.ok
            wider += found.ok and not found.difference <= stated
    print_table("Our models beside the authors' code", HEADER, rows, right=(2, 3, 4, 5))
    result(
        f"compared: {compared}; failed: {failed}; passed by a share or a wider tolerance, "
        f"not by the stated absolute one: {wider}"
    )
    return not failed


def main() -> int:
    """Report on the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"no such folder: {folder}")
    return 0 if report(folder) else 1


if __name__ == "__main__":
    raise SystemExit(main())
