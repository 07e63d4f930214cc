"""Foreign checkpoints become ours completely, or are refused with the model that they belong to."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torchvision.models.video as video
from safetensors.torch import save_file

from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.datasets.locations import remember
from ogreg_core.errors import CheckpointError, DataError, UsageError
from ogreg_core.models import conversion, xvit
from ogreg_core.models.conversion import (
    compare,
    convert,
    find_class_names,
    nearest_model,
    read_foreign,
    settings_in,
)
from ogreg_core.models.registry import MODELS, ModelEntry, create_model
from ogreg_core.models.weights import map_names
from tests.tiny import tiny_checkpoint

TORCHVISION = "ogreg_core.models.torchvision_models"
XVIT = MODELS["xvit-b16"]


def entry(variant, **changes):
    return ModelEntry(
        factory=f"{TORCHVISION}:build_torchvision",
        arguments={"variant": variant},
        options=changes.pop("options", {}),
        frames=changes.pop("frames", 8),
        size=changes.pop("size", 32),
        params_m=1,
        gmacs=1,
        source="test",
        key_map=f"{TORCHVISION}:map_torchvision",
        **changes,
    )


@pytest.fixture(autouse=True)
def _few_models(monkeypatch):
    """A registry of OG-ReG's tiny and small sizes and torchvision's baselines."""
    ours = {
        name: replace(MODELS[name], key_map="ogreg_core.models.weights:map_swin")
        for name in ("ogreg-n", "ogreg-t")
    }
    monkeypatch.setattr("ogreg_core.models.registry.MODELS", ours)
    monkeypatch.setattr(conversion, "MODELS", ours)
    ours |= {
        "swin3d-t": entry("swin3d_t"),
        "swin3d-s": entry("swin3d_s"),
        "swin3d-b": entry("swin3d_b", options={"window": (8, 16)}),
        "mvit-v1-b": entry("mvit_v1_b", fixed_input=True),
        "r2plus1d-18": entry("r2plus1d_18"),
    }


def info(model, labels=(), frames=8, size=32, **options):
    return CheckpointInfo(
        model=model,
        options=options,
        labels=list(labels),
        sampling=ClipSampling("dense", frames, 2),
        size=size,
        short_side=36,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
    )


def refusal(state, found, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        convert(state, found, tmp_path / "x.safetensors", source="foreign.pth")
    assert not list(tmp_path.iterdir())
    return caught.value


@pytest.fixture(scope="module")
def r2plus1d():
    torch.manual_seed(0)
    return video.r2plus1d_18(num_classes=3).eval()


def test_a_foreign_model_answers_as_before(r2plus1d, tmp_path):
    state = {name: tensor.clone() for name, tensor in r2plus1d.state_dict().items()}
    done = convert(
        state, info("r2plus1d-18", "abc"), tmp_path / "x.safetensors", source="foreign.pth"
    )
    assert (done.classes, done.tensors, done.left_out) == (3, len(state), [])
    assert done.parameters == sum(parameter.numel() for parameter in r2plus1d.parameters())
    model, found = load_model(tmp_path / "x.safetensors")
    assert found == info("r2plus1d-18", "abc")
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(clip), r2plus1d(clip))


def test_half_precision_becomes_single(r2plus1d, tmp_path):
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in r2plus1d.state_dict().items()
    }
    convert(state, info("r2plus1d-18"), tmp_path / "x.safetensors", source="foreign.pth")
    model, found = load_model(tmp_path / "x.safetensors")
    assert found.labels == ["0", "1", "2"]
    assert model.head.weight.dtype == torch.float32
    torch.testing.assert_close(model.head.weight, r2plus1d.fc.weight, atol=1e-3, rtol=1e-3)


def test_plain_weights_of_ogreg(tmp_path):
    model = create_model("ogreg-n", 4, strides=[2, 1, 1, 1])
    found = info("ogreg-n", "abcd", strides=[2, 1, 1, 1])
    done = convert(model.state_dict(), found, tmp_path / "x.safetensors", source="foreign.pth")
    assert done.options == {"strides": [2, 1, 1, 1]}
    again, _ = load_model(tmp_path / "x.safetensors")
    assert all(
        torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


def test_what_a_key_map_leaves_out_is_named(monkeypatch, r2plus1d, tmp_path):
    monkeypatch.setattr(
        f"{TORCHVISION}.map_torchvision",
        lambda state: {
            name.replace("fc.", "head."): tensor
            for name, tensor in state.items()
            if name != "optimizer_step"
        },
    )
    state = {**r2plus1d.state_dict(), "optimizer_step": torch.ones(1)}
    done = convert(state, info("r2plus1d-18"), tmp_path / "x.safetensors", source="foreign.pth")
    assert done.left_out == ["optimizer_step"]


@pytest.fixture(scope="module")
def shells():
    """Names and shapes of foreign models, without memory."""
    with torch.device("meta"):
        return {
            "swin3d-s": video.swin3d_s(num_classes=7).state_dict(),
            "swin3d-t": video.swin3d_t(num_classes=7).state_dict(),
            "mvit-v1-b": video.mvit_v1_b(num_classes=7).state_dict(),
        }


@pytest.mark.parametrize("wrong", ["swin3d-t", "swin3d-b", "ogreg-t", "r2plus1d-18", "mvit-v1-b"])
def test_a_wrong_model_is_refused_with_the_right_one(wrong, shells, tmp_path):
    """Of swin3d-s all that swin3d-t has fits it, and still it is another network."""
    error = refusal(shells["swin3d-s"], info(wrong), tmp_path)
    assert f"foreign.pth does not hold the weights of {wrong}" in error.what
    assert "nearest match: swin3d-s, which fits completely" in error.why
    assert error.fix == "--model swin3d-s"
    if wrong == "swin3d-t":
        assert "185 of the model's 185 tensors fit; without a place: features.4.6." in error.why


def test_the_nearest_match_knows_options(tmp_path):
    with torch.device("meta"):
        state = create_model("swin3d-b", 7, window=16).state_dict()
    error = refusal(state, info("swin3d-b"), tmp_path)
    assert "features.0.0.attn.relative_position_bias_table (5239x4, not 2535x4)" in error.why
    assert "nearest match: swin3d-b, window=16, which fits completely" in error.why
    stem = create_model("ogreg-n", 4, stem="patch").state_dict()
    found = nearest_model(stem)
    assert (found.model, found.options, found.complete) == ("ogreg-n", {"stem": "patch"}, True)


def test_clips_built_into_a_model(shells, tmp_path):
    """Made for 16x224x224, asked for 8x32x32."""
    error = refusal(shells["mvit-v1-b"], info("mvit-v1-b"), tmp_path)
    assert "pos_encoding.spatial_pos (3136x96, not 64x96)" in error.why
    assert "frames and size are built into this one" in error.why
    assert "--frames and --size" in error.fix
    found = compare("mvit-v1-b", map_names("mvit-v1-b", shells["mvit-v1-b"]), frames=16, size=224)
    assert found.complete
    assert found.share == 1


def test_weights_without_a_classifier_are_starting_weights(shells, tmp_path):
    bare = {name: t for name, t in shells["swin3d-t"].items() if not name.startswith("head.")}
    error = refusal(bare, info("swin3d-t"), tmp_path)
    assert error.what == "foreign.pth has no classifier (head.weight, head.bias)"
    assert "ogreg train RECIPE --init-from foreign.pth" in error.fix


def test_image_weights_are_starting_weights(tmp_path):
    from torchvision.models import swin_t

    with torch.device("meta"):
        state = swin_t().state_dict()
    error = refusal(state, info("swin3d-t"), tmp_path)
    assert "missing: features.0.0.attn.relative_position_index" in error.why
    assert "no other model is nearer" in error.why
    assert "--init-from foreign.pth" in error.fix


def test_other_classes_are_refused(r2plus1d, tmp_path):
    error = refusal(r2plus1d.state_dict(), info("r2plus1d-18", "ab"), tmp_path)
    assert "tells 3 classes apart, and there are 2 labels" in error.what
    assert "--init-from" in error.fix


def test_numbers_that_are_none_are_refused(r2plus1d, tmp_path):
    state = {name: tensor.clone() for name, tensor in r2plus1d.state_dict().items()}
    state["fc.bias"][1] = torch.nan
    assert "head.bias" in refusal(state, info("r2plus1d-18"), tmp_path).why


def test_weights_of_nothing_known(tmp_path):
    error = refusal({"conv.weight": torch.ones(3, 3)}, info("ogreg-n"), tmp_path)
    assert "nor of any other model" in error.why
    assert error.fix == "ogreg models"
    # The key map's own words where it knows better.
    state = {"layers.0.blocks.0.attn.cpb_mlp.0.weight": torch.ones(3, 3)}
    assert "Swin V2" in refusal(state, info("ogreg-n"), tmp_path).what


def test_what_can_be_read(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    state, names, _ = read_foreign(str(tmp_path / "plain.safetensors"))
    assert list(state) == ["a"]
    assert names is None
    with pytest.raises(CheckpointError, match="does not exist"):
        read_foreign(str(tmp_path / "none.pth"))
    with pytest.raises(UsageError, match="no starting weights called 'swin3d_x'"):
        read_foreign("swin3d_x")
    classes = find_class_names("kinetics400").names
    monkeypatch.setattr(
        conversion, "load_torchvision", lambda name: ({"b": torch.ones(1)}, classes)
    )
    state, names, _ = read_foreign("swin3d_t")
    assert list(state) == ["b"]
    assert (names.names, names.dataset) == (classes, "kinetics400")


def test_our_own_checkpoints_need_no_conversion(demo_root, tmp_path):
    path = tiny_checkpoint(tmp_path / "own.safetensors", demo_root)
    with pytest.raises(CheckpointError, match="is a checkpoint of ogreg already"):
        read_foreign(str(path))


def test_class_names(tmp_path, demo_root):
    (tmp_path / "labels.txt").write_text("clap\r\nwave, left\u2028hand\r\n", encoding="utf-8-sig")
    found = find_class_names(str(tmp_path / "labels.txt"))
    assert found.names == ["clap", "wave, left\u2028hand"]
    assert found.dataset == ""
    expected = (demo_root / "labels.txt").read_text(encoding="utf-8").split()
    assert find_class_names(str(demo_root)).names == expected
    with pytest.raises(DataError, match="no class names in 'demo'"):
        find_class_names("demo")
    remember("demo", demo_root)
    known = find_class_names("demo")
    assert (known.names, known.dataset, known.folder) == (
        expected,
        "demo",
        str(demo_root.resolve()),
    )
    kinetics = find_class_names("kinetics400")
    assert len(kinetics.names) == 400
    assert kinetics.names[:2] == ["abseiling", "air drumming"]


def test_a_checkpoint_tells_its_own_settings(monkeypatch, tmp_path):
    """Rows of the temporal table by its shape, segment and shift divisor by the text beside it."""
    small = xvit.XViTConfig(dim=32, depth=2, heads=2, patch=16)
    monkeypatch.setitem(xvit.VARIANTS, "b16", small)
    monkeypatch.setitem(conversion.MODELS, "xvit-b16", XVIT)
    told = {"segment": 4, "shift_divisor": 4, "time_rows": 16, "aggregation": "attention"}
    model = create_model("xvit-b16", 3, table_size=32, **told).eval()
    file = tmp_path / "foreign.pth"
    text = "XVIT:\n  NUM_SEGMENTS: 4\n  SHIFT_DIV: 4\n"
    # Released checkpoints also hold a classifier that is never used.
    unused = {"new_fc.weight": torch.zeros(3, 32), "new_fc.bias": torch.zeros(3)}
    own = {
        re.sub(r"^head\.", "consensus.mlp_head.4.", name): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save({"epoch": 3, "model_state": own | unused, "cfg": text}, file)
    state, names, configuration = read_foreign(str(file))
    assert names is None
    found = settings_in("xvit-b16", state, configuration)
    assert found == {**told, "table_size": 32}
    assert settings_in("ogreg-n", state, configuration) == {}
    done = info("xvit-b16", "abc", **found)
    written = convert(state, done, tmp_path / "x.safetensors", source=str(file))
    assert sorted(written.left_out) == sorted(unused)
    again, _ = load_model(tmp_path / "x.safetensors")
    clip = torch.randn(1, 3, 8, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(clip), model(clip))


def test_settings_of_another_models_weights_are_none(monkeypatch):
    monkeypatch.setitem(conversion.MODELS, "xvit-b16", XVIT)
    assert settings_in("xvit-b16", {"stem.proj.weight": torch.zeros(4, 3, 2, 2)}) == {}
