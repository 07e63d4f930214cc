from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ogreg_core.data.loader import Views, load_views
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import TestCrops
from ogreg_core.gaze.geometry import ClipGeometry, Lattice, Reduction, lattices_of, reduction_of
from ogreg_core.inference import single_video
from ogreg_core.models.registry import create_model


@pytest.mark.parametrize(("height", "width"), [(240, 320), (400, 180), (130, 130)])
@pytest.mark.parametrize(("size", "short_side"), [(96, 96), (64, 80)])
def test_places_in_the_clip_lead_back_to_the_video(height, width, size, short_side, encode):
    """A white square of the file is found in the clip and mapped back."""
    x, y, side = width // 2 - 14, height // 2 + 9, 16
    frames = np.zeros((4, height, width, 3), np.uint8)
    frames[:, y : y + side, x : x + side] = 255
    path = encode("square.mp4", frames, options={"crf": "5"})
    _, manifest = single_video(path)
    crops = TestCrops(size, short_side)
    views = Views(ClipSampling("uniform", 4), 1, crops)
    clip = load_views(manifest, manifest.rows[0], views)[0, 0, 0].float()
    weight = clip / clip.sum()
    places = torch.arange(size) + 0.5
    found = (float((weight.sum(0) * places).sum()), float((weight.sum(1) * places).sum()))
    geometry = ClipGeometry.of(manifest.rows[0], crops)
    # A tenth of a pixel of the clip.
    scale = geometry.width / size
    assert geometry.to_video(*found) == pytest.approx(
        (x + side / 2, y + side / 2), abs=0.1 * scale + 0.1
    )
    assert geometry.to_clip(*geometry.to_video(12.5, 40)) == pytest.approx((12.5, 40))
    x_edges, y_edges = geometry.edges(size)
    assert len(x_edges) == size + 1
    assert (x_edges[0], y_edges[0]) == geometry.to_video(0, 0)
    assert (x_edges[-1], y_edges[-1]) == pytest.approx(geometry.to_video(size, size))


def test_rotated_videos_are_counted_upright():
    row = SimpleNamespace(width=180, height=320)
    geometry = ClipGeometry.of(row, TestCrops(90, 90))
    assert (geometry.left, geometry.width) == (0, 180)
    assert (geometry.top, geometry.height) == (70, 180)


@pytest.mark.parametrize(
    ("extent", "tokens", "convolved", "step", "shift"),
    [
        (224, 56, 4, 4, 1.5),
        (224, 7, 4, 32, 1.5),
        (224, 7, 1, 32, 0),
        (112, 4, 4, 32, 1.5),  # padded to 128
        (36, 2, 1, 32, 0),
        (120, 7, 1, 16, 0),  # cut to 112
        (112, 7, 0, 16, 7.5),
        (7, 4, 2, 2, 0.5),
        (112, 10, 1, 12, 0),  # a stride of 3
        (16, 16, 2, 1, 0),
    ],
)
def test_steps_of_lattices(extent, tokens, convolved, step, shift):
    lattice = Lattice.over(extent, tokens, convolved)
    assert (lattice.step, lattice.shift) == (step, shift)
    matrix = lattice.interpolation()
    assert matrix.shape == (extent, tokens)
    torch.testing.assert_close(matrix.sum(1), torch.ones(extent))
    for token in range(tokens):
        assert lattice.token_at(lattice.centre(token)) == token


def test_interpolation_is_linear_between_centres():
    lattice = Lattice.over(32, 8, 4)
    centres = torch.tensor([lattice.centre(token) for token in range(8)])
    pixels = lattice.interpolation() @ centres
    inside = slice(3, 28)
    torch.testing.assert_close(pixels[inside], (torch.arange(32) + 0.5)[inside])


# Stages whose receptive fields end inside of the clip.
CONV = {"stem": "conv"}
STAGES = [
    *(
        ("gta-n", {}, (0,)),
        ("r2plus1d-n", {}, (0, 1)),
        ("s3d-n", {}, (0, 1)),
        ("ogreg-n", {}, (0,)),
    ),
    *(("video-focalnet-n", CONV, (0,)), ("swin3d-n", CONV, (0,))),
]


@pytest.mark.parametrize(("name", "options", "stages"), STAGES)
def test_tokens_lie_in_the_middle_of_their_receptive_fields(name, options, stages):
    frames, size = 8, 64
    model = create_model(name, 2, frames=frames, size=size, **options).eval()
    clip = torch.randn(1, 3, frames, size, size, requires_grad=True)
    if name == "swin3d-n":
        features = [model.patch_embed(clip)]
    elif reduction_of(name, options) == Reduction(2, 4):
        # Attention and context reach everywhere.
        features = [model.embed(clip)]
    else:
        features = model.forward_stages(clip)
    for stage in stages:
        grid = features[stage].shape[1:4]
        token = [count // 2 for count in grid]
        # Not all channels: a LayerNorm makes their sum constant.
        score = features[stage][0, token[0], token[1], token[2], ::2].sum()
        gradient = torch.autograd.grad(score, clip, retain_graph=True)[0][0].abs().sum(0)
        reached = (gradient.sum((0, 1)) > 0).nonzero()
        middle = (int(reached.min()) + int(reached.max()) + 1) / 2
        _, _, columns = lattices_of(grid, (frames, size, size), reduction_of(name, options))
        assert columns.centre(token[2]) == middle


def test_patches_lie_on_cells():
    assert reduction_of("ogreg-t", {"stem": "patch"}) == Reduction(1, 1)
    assert reduction_of("swin3d-t", {}) == Reduction(1, 1)
    assert reduction_of("ogreg-t", {}) == Reduction(2, 4)
