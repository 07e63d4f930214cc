from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ogreg_core.gaze.gradcam import grad_cam, last_selection, spread_kept
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.registry import MODELS, create_model
from tests.every_model import architectures, one_thread

FRAMES, SIZE = 8, 64
HALF = {"time": [{"before": 1, "ratio": 0.5}], "space": [{"before": 2, "ratio": 0.6}]}
LAST = {"time": [{"before": 5, "ratio": 0.5}]}
# One size of every architecture; the others differ in widths and depths alone.
CASES = [
    *(("ogreg-n", {}), ("ogreg-n", {"stem": "patch"}), ("video-focalnet-n", {})),
    *(("xvit-n", {}), ("gta-n", {}), ("swin3d-n", {}), ("mvit-v1-n", {})),
    *(("mvit-v2-n", {}), ("r2plus1d-n", {}), ("s3d-n", {})),
    ("ogreg-n", {"token_selection": HALF}),
    ("swin3d-n", {"token_selection": HALF}),
    ("mvit-v1-n", {"token_selection": HALF}),
    ("mvit-v1-n", {"token_selection": LAST}),
    ("r2plus1d-n", {"gta": {"stages": [4], "options": {}}}),
    ("ogreg-n", {"gta": {"stages": [4], "options": {}}}),
]


@pytest.fixture(scope="module", autouse=True)
def small_layers() -> Iterator[None]:
    with one_thread():
        yield


def clip() -> Tensor:
    return torch.randn(1, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def build(name: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, 5, frames=FRAMES, size=SIZE, **options).eval()


def test_every_architecture_is_a_case():
    assert architectures(name for name, _ in CASES) == architectures(MODELS)


@pytest.mark.parametrize(
    ("name", "options"),
    CASES,
    ids=[f"{name}-{'-'.join(options) or 'plain'}" for name, options in CASES],
)
def test_every_architecture_has_a_map_of_each_class(name, options):
    model = build(name, options)
    with torch.inference_mode():
        logits = model(clip())
    found = [grad_cam(model, clip(), target) for target in range(3)]
    for cam in found:
        assert cam.shape == tuple(model.forward_stages(clip())[-1].shape[1:4])
        assert torch.isfinite(cam).all()
        assert cam.min() >= 0
    # Some class has support, and classes differ; nothing of the model has changed.
    assert max(float(cam.max()) for cam in found) > 0
    assert not torch.equal(found[0], found[1])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(clip()), logits)


@pytest.mark.parametrize("name", ["r2plus1d-n", "gta-n"])
def test_with_a_linear_classifier_it_is_the_class_activation_map(name):
    """Selvaraju et al., section 3.1: the classifier's weights on the features, over their number."""
    model = build(name, {})
    features = model.forward_stages(clip())[-1][0]
    weight = model.head.weight[3]
    expected = torch.relu(features @ weight) / features[..., 0].numel()
    torch.testing.assert_close(grad_cam(model, clip(), 3), expected.detach())


def test_it_falls_where_a_patch_speaks_for_the_class():
    """Of a frame-wise network without attention, classes read from single places."""
    model = build("r2plus1d-n", {})
    features = model.forward_stages(clip())[-1][0]
    place = features.norm(dim=-1).argmax()
    model.head.weight.data[0] = features.flatten(0, 2)[place] - features.mean((0, 1, 2))
    assert int(grad_cam(model, clip(), 0).argmax()) == int(place)


def test_gradients_of_selected_tokens_go_where_the_tokens_were():
    kept = torch.zeros(4, 6, 6)
    kept[1, 0:3, 2:5] = kept[3, 3:6, 0:3] = 1
    volume = torch.stack([torch.full((3, 3), 2.0), torch.arange(9.0).reshape(3, 3)])
    spread = spread_kept(volume, kept)
    assert spread[0].sum() == spread[2].sum() == 0
    assert torch.equal(spread[1, 0:3, 2:5], volume[0])
    assert torch.equal(spread[3, 3:6, 0:3], volume[1])
    assert torch.equal(spread != 0, (kept * spread) != 0)
    # After a merging the window has fewer cells than the map of the selection.
    assert spread_kept(torch.ones(2, 1, 1), kept).sum() == 18
    assert last_selection({"time0": BlockMaps(kept=kept[None]), "stage1": BlockMaps()}).shape == (
        4,
        6,
        6,
    )
    assert last_selection({"stage1": BlockMaps()}) is None
