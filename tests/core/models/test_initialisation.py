"""A model that is built without random weights is, once others are loaded, the one that was built with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ogreg_core.models.initialisation import spread_by_inputs, without_random_weights
from ogreg_core.models.registry import MODELS, create_model

# One per file and constructor; token selection adds a buffer that no checkpoint holds.
NAMES = [
    *("ogreg-n", "video-focalnet-n", "xvit-n", "gta-n"),
    *("swin3d-n", "mvit-v1-n", "mvit-v2-n", "r2plus1d-n", "s3d-n"),
]
SELECTION = {"time": [{"before": 1, "ratio": 0.5}], "space": [{"before": 2, "ratio": 0.5}]}


@pytest.mark.parametrize("selection", [None, SELECTION], ids=["all", "selected"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_after_loading(name, selection):
    if selection and not MODELS[name].places:
        pytest.skip("no place for token selection")
    drawn = create_model(name, 5, token_selection=selection)
    with without_random_weights():
        empty = create_model(name, 5, token_selection=selection)
    empty.load_state_dict(drawn.state_dict())
    assert str(empty) == str(drawn)
    for kind in ("named_parameters", "named_buffers"):
        expected = dict(getattr(drawn, kind)())
        found = dict(getattr(empty, kind)())
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0, equal_nan=True)
            assert value.requires_grad == expected[key].requires_grad


def test_nothing_is_drawn_and_all_is_as_before_even_after_an_error():
    before, own = torch.get_rng_state(), nn.init.trunc_normal_
    with pytest.raises(RuntimeError, match="on purpose"), without_random_weights():  # noqa: PT012
        create_model("ogreg-n", 5)
        raise RuntimeError("on purpose")
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.init.trunc_normal_ is own
    assert create_model("ogreg-n", 5).get_parameter("head.weight").std() > 0.01


def test_linear_layers_are_spread_by_their_inputs_and_zeros_stay():
    layers = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 20), nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        layers[1].weight.zero_()
        layers[0].bias.fill_(3.0)
    convolution = layers[2].weight.clone()
    spread_by_inputs(layers)
    # Of a normal distribution that is cut at two deviations 0.8796 of the spread is left.
    assert layers[0].weight.std().item() == pytest.approx(0.8796 / 20, rel=0.02)
    assert layers[0].weight.abs().max().item() <= 2 / 20
    assert not layers[1].weight.any()
    assert (layers[0].bias == 3.0).all()
    assert torch.equal(layers[2].weight, convolution)
