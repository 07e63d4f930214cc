"""GTA on ResNet-50 against torchvision's own, and the thin network against its layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from ogreg_core.errors import UsageError
from ogreg_core.models.gta_resnet import PLACEMENTS, ThinResNet, build_gta, map_gta
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.weights import initialise
from ogreg_core.profiling import count_multiply_adds, count_parameters
from ogreg_core.training.memory import checkpoint_activations
from tests.core.models.test_gta import T


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model whose modules no longer are the identity, with the statistics of noise."""
    torch.manual_seed(3)
    model = build_gta("r50", 7, frames=T)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for module in model.gta:
        nn.init.constant_(module.norm.weight, 0.5)
    with torch.no_grad():
        model.train()(torch.randn(4, 3, T, 64, 64))
    return model.eval()


CLIP = (2, 3, T, 32, 32)


class TestModel:
    @pytest.mark.parametrize("placement", ["nl5", "res4"])
    def test_when_built_is_resnet50_frame_by_frame_and_averaged(self, placement):
        torch.manual_seed(0)
        image = resnet50(num_classes=7).eval()
        model = build_gta("r50", 7, frames=T, placement=placement).eval()
        classes = [f"c{i}" for i in range(7)]
        report = initialise(
            model, map_gta(image.state_dict()), "x", classes=classes, source_classes=classes
        )
        assert not report.unexpected + report.mismatched + report.other_classes + report.inflated
        assert len(report.taken) == len(image.state_dict())
        assert report.missing
        assert all(name.startswith("gta.") for name in report.missing)
        clip = torch.randn(1, 3, T, 40, 32)
        with torch.no_grad():
            frames = torch.stack([image(clip[:, :, t]) for t in range(T)])
            torch.testing.assert_close(model(clip), frames.mean(0), atol=1e-5, rtol=1e-5)

    def test_imagenet_classifier_is_left_out_and_said(self):
        model = build_gta("r50", 7, frames=T)
        report = initialise(model, map_gta(resnet50().state_dict()), "x")
        assert report.other_classes == ["head.weight", "head.bias"]
        assert "gta.*.norm" in report.summary()

    def test_own_names_stay(self):
        own = build_gta("r50", 7, frames=T).state_dict()
        assert list(map_gta(own)) == list(own)

    def test_state_dict_has_the_tables_shapes(self):
        shapes = {k: tuple(v.shape) for k, v in build_gta("r50", 400).state_dict().items()}
        expected = {
            "stem.conv1.weight": (64, 3, 7, 7),
            "stages.3.2.conv3.weight": (2048, 512, 1, 1),
            "gta.0.qkv.weight": (3 * 256, 512),
            "gta.0.pixel.matrix": (8, 8, 8, 8),
            "gta.0.region.assign.weight": (16, 512),
            "gta.0.region.temporal.matrix": (8, 8, 8, 8),
            "gta.0.out.weight": (512, 256),
            "gta.4.qkv.weight": (3 * 512, 1024),
            "gta.4.norm.weight": (1024,),
            "head.weight": (400, 2048),
        }
        assert {name: shapes[name] for name in expected} == expected
        assert not any(name.startswith("gta.5") for name in shapes)

    def test_protocol(self, trained):
        assert isinstance(trained, VideoModel)
        clip = torch.randn(CLIP)
        with torch.no_grad():
            plain = trained(clip)
            stages = trained.forward_stages(clip)
        assert [tuple(x.shape[1:]) for x in stages] == [
            (T, 8, 8, 256),
            (T, 4, 4, 512),
            (T, 2, 2, 1024),
            (T, 1, 1, 2048),
        ]
        logits, maps = trained.forward_with_maps(clip)
        torch.testing.assert_close(logits, plain)
        assert list(maps) == [
            "stage2.block2",
            "stage2.block4",
            "stage3.block2",
            "stage3.block4",
            "stage3.block6",
        ]
        assert not any(module._forward_pre_hooks for module in trained.gta)

    def test_every_parameter_in_one_layer_and_the_matrices_do_not_decay(self, trained):
        layers = trained.layers()
        assert len(layers) == 1 + 16 + 1
        assert layers[-1] == ["head"]
        exempt = trained.no_weight_decay()
        for name, parameter in trained.named_parameters():
            owners = [n for n, part in enumerate(layers) for p in part if name.startswith(f"{p}.")]
            assert len(owners) == 1, name
            assert (name in exempt) == (parameter.ndim == 1 or name.endswith(".matrix"))
        biased = build_gta("r50", 7, frames=T, bias="frame")
        assert "gta.2.region.temporal.bias" in biased.no_weight_decay()

    def test_gradients_reach_every_parameter(self, trained):
        model = copy.deepcopy(trained).train()
        model(torch.randn(CLIP)).square().sum().backward()
        assert [n for n, p in model.named_parameters() if not p.grad.abs().max() > 0] == []

    def test_recomputed_activations_give_the_same_gradients(self, trained):
        plain, saved = copy.deepcopy(trained), copy.deepcopy(trained)
        checkpoint_activations(saved, [1, 2, 3, 4])
        assert sum(len(stage) for stage in saved.stage_blocks()) == 16 + 5
        clip = torch.randn(1, 3, T, 32, 32)
        for model in (plain, saved):
            model(clip).square().sum().backward()
        for ours, theirs in zip(plain.parameters(), saved.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)

    def test_order_of_frames_matters(self, trained):
        clip = torch.randn(CLIP)
        with torch.no_grad():
            assert (trained(clip) - trained(clip.flip(2))).abs().max() > 1e-4

    @pytest.mark.parametrize("size", [(33, 32), (45, 70)])
    def test_odd_sizes_run(self, trained, size):
        with torch.no_grad():
            assert trained(torch.randn(1, 3, T, *size)).isfinite().all()

    def test_dropout_and_drop_path_are_where_they_are_said(self):
        model = build_gta("r50", 7, frames=T, dropout=0.3, drop_path=0.2)
        rates = [module.drop_path.rate for module in model.gta]
        assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
        assert model.dropout.p == 0.3

    def test_bf16_autocast_runs_and_the_early_stages_stay_close(self, trained):
        """Later on an untrained ResNet-50 magnifies rounding by itself, with and without modules."""
        clip = torch.randn(CLIP)
        with torch.no_grad():
            full = trained.forward_stages(clip)[:2]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = trained.forward_stages(clip)[:2]
                assert trained(clip).isfinite().all()
        for expected, ours in zip(full, half, strict=True):
            assert (ours.float() - expected).norm() < 0.15 * expected.norm()

    @pytest.mark.slow
    def test_compiles_as_one_graph(self, trained):
        clip = torch.randn(1, 3, T, 32, 32)
        compiled = torch.compile(copy.deepcopy(trained), backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(clip), trained(clip), atol=1e-5, rtol=1e-4)

    def test_unknown_backbones_and_small_pictures_are_refused(self):
        with pytest.raises(UsageError, match="no backbone 'r18'"):
            build_gta("r18", 7)
        with pytest.raises(UsageError, match="16 pixels"):
            build_gta("r50", 7, size=16)

    def test_small_network_has_fewer_blocks(self):
        with pytest.raises(UsageError, match="placement nl5") as caught:
            build_gta("n", 7, placement="nl5")
        assert caught.value.fix == "model.options.placement=nl4"
        model = build_gta("n", 7, frames=T)
        assert [len(stage) for stage in model.stages] == [2, 2, 2, 2]
        followers = [layer for layer in model.layers() if len(layer) > 1]
        assert followers == [
            [f"stages.{s}.{b}", f"gta.{i}"] for i, (s, b) in enumerate(PLACEMENTS["nl4"])
        ]

    def test_thin_network_has_the_layers_of_resnet50(self):
        """With the same depths: kernels and strides by the same names, a quarter of the channels."""
        with torch.device("meta"):
            thin, whole = ThinResNet([3, 4, 6, 3]), resnet50()
        shapes = dict(thin.named_parameters())
        for name, parameter in whole.named_parameters():
            if name.startswith("fc."):
                continue
            own, theirs = shapes[name].shape, parameter.shape
            assert own[0] == theirs[0] // 4, name
            assert own[2:] == theirs[2:], name
            if len(own) > 1:
                assert own[1] == (3 if name == "conv1.weight" else theirs[1] // 4), name
        strides = [
            [m.stride for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (thin, whole)
        ]
        assert strides[0] == strides[1]


@pytest.mark.slow
def test_backbone_costs_what_a_resnet50_costs():
    """mmaction2's TSM-R50, whose shift costs nothing: 23.87 M with 174 classes."""
    model = build_gta("r50", 400, frames=8, placement="res4")
    modules = sum(count_parameters(module) for module in model.gta)
    head = count_parameters(model.head)
    assert (count_parameters(model) - modules - head + 2049 * 174) / 1e6 == pytest.approx(
        23.87, rel=0.005
    )
    flops = count_multiply_adds(model, torch.zeros(1, 3, 8, 224, 224))
    backbone = flops.total - flops.by_module["gta"]
    assert backbone / 1e9 == pytest.approx(32.88, rel=0.005)
    assert not flops.uncounted
