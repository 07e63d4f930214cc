"""A model that is built without random weights is, once others are loaded, the one that was built with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ogreg_core.models.initialisation import without_random_weights
from ogreg_core.models.registry import MODELS, create_model
from tests.every_model import thinned

# One per file and constructor; token selection adds a buffer that no checkpoint holds.
NAMES = [
    *("ogreg-n", "video-focalnet-t", "xvit-b16", "gta-r50-8f"),
    *("swin3d-t", "mvit-v1-b", "mvit-v2-s", "r2plus1d-18", "s3d"),
]
SELECTION = {"time": [{"before": 1, "ratio": 0.5}], "space": [{"before": 2, "ratio": 0.5}]}


@pytest.mark.parametrize("selection", [None, SELECTION], ids=["all", "selected"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_after_loading(name, selection):
    if selection and not MODELS[name].places:
        pytest.skip("no place for token selection")
    with thinned():
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
