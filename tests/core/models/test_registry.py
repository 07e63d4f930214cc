"""The contract that every model of the registry keeps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ogreg_core.errors import UsageError
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.registry import MODELS, create_model, find_model
from ogreg_core.profiling import count_multiply_adds, count_parameters


def test_importing_the_registry_imports_no_torch():
    code = "import sys, ogreg_core.models.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", MODELS)
def test_contract(name):
    model = create_model(name, 5).eval()
    assert isinstance(model, VideoModel)
    assert model.num_classes == 5
    clip = torch.randn(1, 3, 2, 32, 32)
    logits, maps = model.forward_with_maps(clip)
    assert logits.shape == (1, 5)
    assert maps
    assert len(model.forward_stages(clip)) == 4
    assert model.no_weight_decay() < {name for name, _ in model.named_parameters()}


# Millions of parameters and billions of multiply-adds of the design's table, 400 classes, patch stem.
DESIGN = [
    ("ogreg-n", 8, 112, 1.8, 0.25),
    ("ogreg-t", 32, 224, 28.1, 64.7),
    ("ogreg-t", 16, 224, 28.1, 31.0),
    ("ogreg-s", 32, 224, 49.6, 125.0),
    ("ogreg-b", 32, 224, 87.8, 217.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames", "size", "params", "gmacs"), DESIGN)
def test_costs_of_the_patch_stem_are_those_of_the_design(name, frames, size, params, gmacs):
    model = create_model(name, 400, stem="patch")
    assert count_parameters(model) / 1e6 == pytest.approx(params, rel=0.02)
    flops = count_multiply_adds(model, torch.zeros(1, 3, frames, size, size))
    assert flops.total / 1e9 == pytest.approx(gmacs, rel=0.02)
    assert not flops.uncounted


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_costs_in_the_registry_are_those_of_the_built_model(name):
    entry = MODELS[name]
    model = create_model(name, 400)
    flops = count_multiply_adds(model, torch.zeros(1, 3, entry.frames, entry.size, entry.size))
    assert count_parameters(model) / 1e6 == pytest.approx(entry.params_m, rel=0.005)
    assert flops.total / 1e9 == pytest.approx(entry.gmacs, rel=0.005)


def test_tiny_model_stays_within_its_budget():
    assert MODELS["ogreg-t"].gmacs < 68.0


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UsageError) as caught:
        find_model("OGReg_t")
    assert "ogreg-t" in caught.value.why
    with pytest.raises(UsageError) as caught:
        create_model("ogreg-n", 3, stm="conv")
    assert "'stem'" in caught.value.why


@pytest.mark.parametrize(
    "options",
    [
        {"stem": "foo"},
        {"gaze": "3D"},
        {"similarity": 1},
        {"strides": [4, 2, 1]},
        {"strides": [4, 2, 1, 0]},
        {"strides": 4},
        {"strides": [4, 2, 1, 1.0]},
    ],
)
def test_values_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError, match="model option") as caught:
        create_model("ogreg-n", 3, **options)
    assert "must be" in caught.value.why
