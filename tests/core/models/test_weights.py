"""Starting weights from randomly initialised torchvision models: nothing is downloaded."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchvision.models import swin_t
from torchvision.models.video import swin3d_t

from ogreg_core.errors import CheckpointError, UsageError
from ogreg_core.models.ogreg import build_ogreg
from ogreg_core.models.weights import initialise, load_state_file, load_torchvision, map_swin


@pytest.fixture(scope="module")
def swin():
    return swin_t()


@pytest.fixture(scope="module")
def swin3d():
    return swin3d_t()


def test_swin_fits_and_inflates(swin):
    model = build_ogreg("t", 10, stem="patch")
    report = initialise(model, map_swin(swin.state_dict()), "swin_t")
    assert report.inflated == ["stem.proj.weight"]
    # 12 blocks of 12 tensors, 3 mergings of 3, stem bias and norm, final norm; the head is not taken.
    assert len(report.taken) == 12 * 12 + 3 * 3 + 3 + 2
    assert report.mismatched == ["head.weight", "head.bias"]
    assert len(report.unexpected) == 24
    assert all("relative_position" in name for name in report.unexpected)
    left = {name.split(".", 3)[-1] for name in report.missing if name.startswith("stages")}
    assert left == {
        "glance.position.weight",
        "glance.position.bias",
        "gaze.weight",
        "gaze.bias",
        "gaze.sharpness",
        "gaze.offset",
    }
    torch.testing.assert_close(model.stem.proj.weight.sum(2), swin.features[0][0].weight)
    torch.testing.assert_close(
        model.stages[2][3].glance.qkv.weight, swin.features[5][3].attn.qkv.weight
    )
    torch.testing.assert_close(model.merges[1].reduction.weight, swin.features[4].reduction.weight)


def test_inflated_stem_sees_a_still_clip_as_the_picture(swin):
    model = build_ogreg("t", 10, stem="patch")
    initialise(model, map_swin(swin.state_dict()), "swin_t")
    picture = torch.randn(1, 3, 64, 64)
    expected = swin.features[0](picture)
    found = model.stem(picture[:, :, None].expand(-1, -1, 2, -1, -1))[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_swin3d_fits_without_inflation_and_its_head_by_class_names(swin3d):
    names = [f"action {i}" for i in range(400)]
    model = build_ogreg("t", 400, stem="patch")
    report = initialise(
        model, map_swin(swin3d.state_dict()), "swin3d_t", classes=names, source_classes=names
    )
    assert not report.inflated
    assert "head.weight" in report.taken
    torch.testing.assert_close(
        model.stages[3][1].proj.weight, swin3d.features[6][1].attn.proj.weight
    )
    other = build_ogreg("t", 400, stem="patch")
    report = initialise(
        other, map_swin(swin3d.state_dict()), "swin3d_t", classes=names[::-1], source_classes=names
    )
    assert "head.weight" in report.mismatched


def test_every_name_of_both_sides_is_reported_once(swin):
    model = build_ogreg("t", 10, stem="patch")
    state = map_swin(swin.state_dict())
    report = initialise(model, state, "swin_t")
    named = [*report.taken, *report.inflated, *report.mismatched, *report.unexpected]
    assert sorted(named) == sorted(state)
    own = [*report.taken, *report.inflated, *report.mismatched, *report.missing]
    assert sorted(own) == sorted(model.state_dict())


def test_another_size_is_refused(swin):
    with pytest.raises(CheckpointError, match="fit none"):
        initialise(build_ogreg("n", 10, stem="patch"), {"a.weight": torch.zeros(3, 3)}, "strange")


def test_image_and_video_checkpoints_of_ours_start_each_other():
    source, target = build_ogreg("n", 5), build_ogreg("n", 9)
    report = initialise(target, source.state_dict(), "ours")
    assert report.mismatched == ["head.weight", "head.bias"]
    assert not report.unexpected


class TestFiles:
    def test_pth_with_plain_tensors_loads_nested_or_not(self, tmp_path):
        state = {"a": torch.ones(2)}
        for name, content in (
            ("flat", state),
            ("model", {"model": state}),
            ("sd", {"state_dict": state}),
        ):
            torch.save(content, tmp_path / f"{name}.pth")
            assert torch.equal(load_state_file(tmp_path / f"{name}.pth")["a"], torch.ones(2))

    def test_malicious_pickle_is_refused_and_not_run(self, tmp_path):
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return (open, (str(marker), "w"))

        (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_state_file(tmp_path / "evil.pth")
        torch.save({"model": Evil()}, tmp_path / "evil2.pth")
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_state_file(tmp_path / "evil2.pth")
        assert not marker.exists()

    def test_missing_and_senseless_files(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_state_file(tmp_path / "none.pth")
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(CheckpointError, match="no state_dict"):
            load_state_file(tmp_path / "list.pth")
        (tmp_path / "x.safetensors").write_bytes(b"nonsense")
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_state_file(tmp_path / "x.safetensors")

    def test_unknown_torchvision_name(self):
        with pytest.raises(UsageError, match="no starting weights"):
            load_torchvision("swin_z")
