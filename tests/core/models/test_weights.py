"""Starting weights from randomly initialised torchvision models: nothing is downloaded."""

from __future__ import annotations

import json
import pickle
import shlex
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_weight, swin_t, swin_v2_t
from torchvision.models.swin_transformer import PatchMerging
from torchvision.models.video import swin3d_t

from ogreg_core.errors import CheckpointError, UsageError
from ogreg_core.models.ogreg import build_ogreg
from ogreg_core.models.weights import (
    PRETRAINED,
    initialise,
    load_state_file,
    load_torchvision,
    map_swin,
)


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
    assert report.other_classes == ["head.weight", "head.bias"]
    assert not report.mismatched
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
    assert "head.weight" in report.other_classes


def test_every_name_of_both_sides_is_reported_once(swin):
    model = build_ogreg("t", 10, stem="patch")
    state = map_swin(swin.state_dict())
    report = initialise(model, state, "swin_t")
    both = [*report.taken, *report.inflated, *report.mismatched, *report.other_classes]
    assert sorted([*both, *report.unexpected]) == sorted(state)
    assert sorted([*both, *report.missing]) == sorted(model.state_dict())


def test_summary_names_what_was_left_and_json_holds_every_name(swin):
    model = build_ogreg("t", 10, stem="patch")
    report = initialise(model, map_swin(swin.state_dict()), "swin_t")
    assert report.summary() == (
        "weights from swin_t: 158 taken; 1 inflated over time; left at initialisation: "
        "stages.*.glance.position (24), stages.*.gaze (48), head (2), of other classes; "
        "not used: stages.*.attn (24)"
    )
    document = json.loads(json.dumps(report.as_dict()))
    assert document["schema"] == "ogreg.init.v1"
    assert document["source"] == "swin_t"
    lists = ["taken", "inflated", "missing", "unexpected", "mismatched", "other_classes"]
    lists.append("other_settings")
    assert document["counts"] == {key: len(document[key]) for key in lists}
    assert document["inflated"] == ["stem.proj.weight"]


def test_summary_counts_blocks_that_a_smaller_model_has_not():
    model = build_ogreg("s", 10, stem="conv")
    report = initialise(model, build_ogreg("t", 10, stem="patch").state_dict(), "ogreg-t")
    found = report.summary()
    assert "12 whole blocks of stages.2" in found
    assert "stem.conv1 (1)" in found
    assert "not used: stem.proj (2)" in found
    assert "gaze" not in found


def official(state: dict[str, torch.Tensor], timm: bool = False) -> dict[str, torch.Tensor]:
    """A torchvision swin_t state dict under the names of microsoft/Swin-Transformer, or of timm."""
    names = {"features.0.0": "patch_embed.proj", "features.0.2": "patch_embed.norm"}
    for stage, depth in enumerate((2, 2, 6, 2)):
        for block in range(depth):
            old, new = f"features.{2 * stage + 1}.{block}", f"layers.{stage}.blocks.{block}"
            for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "attn"):
                names[f"{old}.{part}"] = f"{new}.{part}"
            names |= {f"{old}.mlp.0": f"{new}.mlp.fc1", f"{old}.mlp.3": f"{new}.mlp.fc2"}
        for part in ("reduction", "norm"):
            layer = stage + 1 if timm else stage
            names[f"features.{2 * stage + 2}.{part}"] = f"layers.{layer}.downsample.{part}"
    names |= {"norm": "norm", "head": "head.fc" if timm else "head"}
    parts = {name: name.rpartition(".") for name in state}
    return {f"{names[parts[name][0]]}.{parts[name][2]}": state[name] for name in state}


@pytest.mark.parametrize("timm", [False, True], ids=["microsoft", "timm"])
def test_official_names_give_what_torchvisions_give(swin, timm):
    expected, found = build_ogreg("t", 10, stem="patch"), build_ogreg("t", 10, stem="patch")
    first = initialise(expected, map_swin(swin.state_dict()), "swin_t")
    state = official(swin.state_dict(), timm)
    assert "layers.2.blocks.5.attn.relative_position_index" in state
    assert ("layers.3.downsample.norm.bias" in state) is timm
    found.load_state_dict({**expected.state_dict(), **_noise(first.taken + first.inflated, found)})
    second = initialise(found, map_swin(state), "official")
    assert sorted(second.taken) == sorted(first.taken)
    assert sorted(second.unexpected) == sorted(first.unexpected)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def _noise(names: list[str], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    own = model.state_dict()
    return {name: torch.randn_like(own[name]) for name in names}


def test_video_swins_prefixes_are_understood(swin3d, tmp_path):
    """As mmaction2 saves it: state_dict, backbone and cls_head."""
    image = official(swin_t(num_classes=400).state_dict())
    image["patch_embed.proj.weight"] = swin3d.patch_embed.proj.weight.detach()
    state = {f"backbone.{name}": tensor for name, tensor in image.items() if "head" not in name}
    state |= {f"cls_head.fc_cls.{part}": image[f"head.{part}"] for part in ("weight", "bias")}
    torch.save({"meta": {"epoch": 30}, "state_dict": state}, tmp_path / "video_swin.pth")
    names = [str(i) for i in range(400)]
    model = build_ogreg("t", 400, stem="patch")
    report = initialise(
        model,
        map_swin(load_state_file(tmp_path / "video_swin.pth")),
        "video_swin.pth",
        classes=names,
        source_classes=names,
    )
    assert len(report.taken) == 12 * 12 + 3 * 3 + 4 + 2 + 2
    assert torch.equal(model.head.weight, image["head.weight"])
    assert torch.equal(model.stem.proj.weight, swin3d.patch_embed.proj.weight)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (5, 7)])
def test_mergings_order_channels_as_swin_does(height, width):
    """Swin's own order: rows 0 1 0 1, columns 0 0 1 1 of each 2 x 2 neighbourhood."""
    merging, ours = PatchMerging(4), build_ogreg("n", 2).merges[0]
    torch.nn.init.normal_(merging.norm.weight)
    ours.norm, ours.reduction = merging.norm, merging.reduction
    x = torch.randn(2, 3, height, width, 4)
    padded = torch.nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    corners = [padded[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
    written_out = merging.reduction(merging.norm(torch.cat(corners, -1)))
    torch.testing.assert_close(merging(x), written_out)
    torch.testing.assert_close(ours(x), written_out)


def test_swin_v2_is_refused_though_its_names_fit():
    with pytest.raises(CheckpointError, match="Swin V2"):
        map_swin(swin_v2_t().state_dict())


def test_an_image_model_sees_a_picture_as_the_video_model_sees_it_standing_still():
    """What makes one frame a fair start for many."""
    image = build_ogreg("n", 5).eval()
    for block in image.blocks().values():
        torch.nn.init.normal_(block.gaze.bias)
        torch.nn.init.normal_(block.glance.position.weight)
    video = build_ogreg("n", 5).eval()
    names = list("abcde")
    report = initialise(video, image.state_dict(), "ours", classes=names, source_classes=names)
    assert len(report.taken) == len(image.state_dict())
    picture = torch.randn(2, 3, 1, 64, 64)
    with torch.no_grad():
        still = video(picture.expand(-1, -1, 8, -1, -1))
        torch.testing.assert_close(still, image(picture), atol=1e-4, rtol=1e-4)


def test_one_frame_trains_all_but_what_listens_to_time():
    model = build_ogreg("n", 5)
    model(torch.randn(2, 3, 1, 64, 64)).sum().backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    assert idle == {f"stages.{s}.{b}.gaze.{part}" for s, b in BLOCKS_OF_N for part in LISTENERS}
    taps = model.stages[0][0].gaze.weight.grad.abs().sum(dim=(0, 1, 3, 4))
    assert taps[0] == taps[2] == 0
    assert taps[1] > 0


BLOCKS_OF_N = [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]
LISTENERS = ("sharpness", "offset")


def test_another_size_is_refused(swin):
    with pytest.raises(CheckpointError, match="fit none"):
        initialise(build_ogreg("n", 10, stem="patch"), {"a.weight": torch.zeros(3, 3)}, "strange")


def test_image_and_video_checkpoints_of_ours_start_each_other():
    source, target = build_ogreg("n", 5), build_ogreg("n", 9)
    report = initialise(target, source.state_dict(), "ours")
    assert report.other_classes == ["head.weight", "head.bias"]
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

    def test_safetensors_and_the_prefix_of_data_parallel_training(self, tmp_path):
        state = {"stem.norm.bias": torch.ones(2), "head.bias": torch.zeros(3)}
        save_file(state, tmp_path / "a.safetensors")
        assert load_state_file(tmp_path / "a.safetensors").keys() == state.keys()
        torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / "a.pth")
        assert load_state_file(tmp_path / "a.pth").keys() == state.keys()

    def test_malicious_pickle_is_refused_and_not_run(self, tmp_path):
        marker = tmp_path / "ran"
        for number, path in enumerate(malicious_files(tmp_path, marker)):
            with pytest.raises(CheckpointError, match="could run code") as caught:
                load_state_file(path)
            # torch's own text recommends to switch the protection off.
            assert "weights_only" not in str(caught.value)
            assert "\n" not in str(caught.value)
            assert str(path) in caught.value.what
            if number:
                assert "it names io.open" in caught.value.why
        assert not marker.exists()
        # The same file does its work where it is trusted: the test can fail.
        torch.load(path, weights_only=False)
        assert marker.exists()

    def test_missing_and_senseless_files(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_state_file(tmp_path / "none.pth")
        for content in ([1, 2], {"epoch": 3}, {3: torch.ones(1)}):
            torch.save(content, tmp_path / "list.pth")
            with pytest.raises(CheckpointError, match="no state_dict"):
                load_state_file(tmp_path / "list.pth")
        (tmp_path / "cut.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:-30])
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_state_file(tmp_path / "cut.pth")
        (tmp_path / "x.safetensors").write_bytes(b"nonsense")
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            load_state_file(tmp_path / "x.safetensors")


def malicious_files(folder: Path, marker: Path) -> list[Path]:
    """A bare pickle and a torch archive that create ``marker`` when they are loaded."""

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    bare, archive = folder / "evil.pth", folder / "archive.pth"
    bare.write_bytes(pickle.dumps({"model": Evil()}))
    torch.save({"model": Evil()}, archive)
    return [bare, archive]


class TestTorchvisionNames:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "it's torch"))

    @pytest.fixture
    def cache(self, tmp_path) -> Path:
        folder = tmp_path / "it's torch" / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        return folder

    @pytest.fixture
    def requests(self, monkeypatch) -> list[str]:
        """No network; the addresses that were asked for."""
        asked: list[str] = []

        def refuse(request, *_, **__):
            asked.append(request.full_url)
            raise urllib.error.URLError("Name or service not known")

        # torch.hub holds the function by its name.
        monkeypatch.setattr(torch.hub, "urlopen", refuse)
        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        return asked

    def test_unknown(self):
        with pytest.raises(UsageError, match="no starting weights"):
            load_torchvision("swin_z")

    @pytest.mark.parametrize("name", PRETRAINED)
    def test_without_network_the_error_says_what_to_fetch_and_where_to_put_it(
        self, name, requests, tmp_path
    ):
        url = get_weight(PRETRAINED[name]).url
        with pytest.raises(CheckpointError, match="nor reachable") as caught:
            load_torchvision(name)
        assert requests == [url]
        assert "Name or service not known" in caught.value.why
        words = shlex.split(caught.value.fix, comments=True)
        place = tmp_path / "it's torch" / "hub" / "checkpoints" / Path(url).name
        assert words == ["curl", "-L", "--create-dirs", "-o", str(place), url]
        assert "init.weights=PATH" in caught.value.fix

    def test_what_was_put_there_is_taken(self, swin, cache, requests):
        torch.save(swin.state_dict(), cache / "swin_t-704ceda3.pth")
        state, classes = load_torchvision("swin_t")
        assert torch.equal(state["head.weight"], swin.head.weight)
        assert classes[:2] == ["tench", "goldfish"]
        assert len(classes) == 1000
        assert requests == []

    def test_a_malicious_file_in_the_cache_is_refused_and_not_run(self, cache, tmp_path, requests):
        marker = tmp_path / "ran"
        _, archive = malicious_files(tmp_path, marker)
        archive.rename(cache / "swin_t-704ceda3.pth")
        with pytest.raises(CheckpointError, match="could run code"):
            load_torchvision("swin_t")
        assert not marker.exists()

    def test_a_malicious_download_is_refused_and_not_run(self, cache, tmp_path, monkeypatch):
        marker = tmp_path / "ran"
        _, archive = malicious_files(tmp_path, marker)
        monkeypatch.setattr(
            torch.hub, "download_url_to_file", lambda _url, to, *_, **__: archive.rename(to)
        )
        with pytest.raises(CheckpointError, match="could run code"):
            load_torchvision("swin_t")
        assert (cache / "swin_t-704ceda3.pth").exists()
        assert not marker.exists()
