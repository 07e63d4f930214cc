"""Published checkpoints of X-ViT and Vision Transformers: names, and settings that they tell of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ogreg_core.errors import CheckpointError
from ogreg_core.models.weights import initialise
from ogreg_core.models.xvit import XViT
from ogreg_core.models.xvit_weights import map_xvit, settings_of
from tests.core.models.test_xvit import CLASSES, DIM, meta_model, on_meta, released_shapes, tiny


def foreign(model: XViT, *, average: bool = False) -> dict[str, Tensor]:
    """A model's weights under the authors' names."""
    names = {"head.": "new_fc." if average else "consensus.mlp_head.4."}
    names |= {
        "temporal.block.": "consensus.temporal_encoder.0.",
        "temporal.norm.": "consensus.mlp_head.0.",
    }
    names |= {"temporal.hidden.": "consensus.mlp_head.1.", "temporal.cls": "consensus.cls"}
    state = {}
    for name, tensor in model.state_dict().items():
        start = next((ours for ours in names if name.startswith(ours)), "")
        theirs = names.get(start, "base_model.") + name.removeprefix(start)
        theirs = theirs.replace("patch_embed.", "patch_embed.proj.")
        state[theirs.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")] = tensor
    return state


class TestForeignCheckpoints:
    @pytest.mark.parametrize("aggregation", ["attention", "average"])
    def test_official_weights_give_the_same_logits(self, aggregation):
        source = tiny(aggregation=aggregation)
        state = foreign(source, average=aggregation == "average")
        assert not any(name in source.state_dict() for name in state)
        target = XViT(source.config, CLASSES).eval()
        target.load_state_dict(map_xvit(state), strict=True)
        clip = torch.randn(1, 3, 4, 32, 32)
        assert torch.equal(target(clip), source(clip))

    def test_unused_classifier_is_left_out(self):
        model = tiny()
        extra = {"new_fc.weight": torch.randn(CLASSES, DIM), "new_fc.bias": torch.randn(CLASSES)}
        report = initialise(model, map_xvit(foreign(model) | extra), "released")
        assert report.unexpected == []
        assert report.other_classes == ["head.weight", "head.bias"]
        assert not report.missing

    def test_image_weights_of_timm(self):
        model = tiny()
        theirs = {
            name.removeprefix("base_model."): tensor + 1
            for name, tensor in foreign(model).items()
            if name.startswith("base_model.") and "temp_embed" not in name
        }
        image_head = {
            "pre_logits.fc.weight": torch.zeros(DIM, DIM),
            "pre_logits.fc.bias": torch.zeros(DIM),
            "head.weight": torch.zeros(21843, DIM),
            "head.bias": torch.zeros(21843),
        }
        before = copy.deepcopy(model.state_dict())
        report = initialise(model, map_xvit(theirs | image_head), "vit_base_patch16_224_in21k")
        assert len(report.taken) == len(theirs)
        assert report.unexpected == ["pre_logits.fc.weight", "pre_logits.fc.bias"]
        assert report.other_classes == ["head.weight", "head.bias"]
        assert all(n == "temp_embed" or n.startswith("temporal.") for n in report.missing)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name] + (name in report.taken))

    def test_older_names_of_torchvision(self):
        old = {"encoder.layers.encoder_layer_2.mlp.linear_1.weight": torch.zeros(1)}
        assert list(map_xvit(old)) == ["blocks.2.mlp.0.weight"]

    def test_own_names_stay(self):
        state = tiny().state_dict()
        assert list(map_xvit(state)) == list(state)


class TestSettings:
    def test_of_released_weights(self):
        expected = {"table_size": 224, "aggregation": "attention", "time_rows": 8}
        for classes, segment, divisor in ((400, 8, 8), (600, 8, 8), (174, 16, 4)):
            assert settings_of(on_meta(released_shapes(classes))) == {
                **expected,
                "segment": segment,
                "shift_divisor": divisor,
            }

    def test_rows_are_read_from_the_weights(self):
        shapes = released_shapes(97) | {"base_model.temp_embed": (1, 16, 1, 768)}
        settings = settings_of(on_meta(shapes))
        assert settings["time_rows"] == 16
        # Nothing tells these for 97 classes.
        assert not {"segment", "shift_divisor"} & settings.keys()

    @pytest.mark.parametrize(
        ("cfg", "expected"),
        [
            (
                "XVIT:\n  LOCATIONS_LIST: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]\n"
                "  NUM_SEGMENTS: 4\n  SHIFT_DIV: 6\n  USE_XVIT: true\n",
                {"segment": 4, "shift_divisor": 6, "mixing": "all"},
            ),
            (
                "XVIT:\n  LOCATIONS_LIST:\n  - 9\n  - 10\n  - 11\n  NUM_SEGMENTS: 16\n",
                {"segment": 16, "shift_divisor": 8, "mixing": [9, 10, 11]},
            ),
            (
                "XVIT:\n  LOCATIONS_LIST: [6, 7, 8, 9, 10, 11]\n",
                {"segment": 8, "shift_divisor": 8, "mixing": "second-half"},
            ),
            ("XVIT:\n  USE_XVIT: false\n", {"segment": 8, "shift_divisor": 8, "window": 0}),
        ],
    )
    def test_the_authors_configuration_wins(self, cfg, expected):
        settings = settings_of(on_meta(released_shapes(400)), cfg)
        assert {key: settings[key] for key in expected} == expected
        assert settings.keys() - expected.keys() == {"table_size", "time_rows", "aggregation"}
        meta_model("b16", 400, **settings)

    def test_of_image_weights(self):
        vit = {
            "pos_embed": torch.empty(1, 577, 8),
            "patch_embed.proj.weight": torch.empty(8, 3, 16, 16),
        }
        assert settings_of(vit) == {"table_size": 384}

    def test_of_our_own_weights_build_the_same_network(self):
        for choices in ({"time_rows": 5}, {"aggregation": "average"}):
            model = tiny(**choices)
            settings = settings_of(model.state_dict())
            assert settings["time_rows"] == model.config.time_rows
            assert settings["aggregation"] == model.config.aggregation
            assert settings["table_size"] == 32

    def test_other_weights_are_refused(self):
        with pytest.raises(CheckpointError, match="Vision Transformer"):
            settings_of({"layer1.0.conv1.weight": torch.zeros(1)})
