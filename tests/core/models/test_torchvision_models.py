"""The wrappers against torchvision's own models: same weights, same logits to the bit; maps by probing."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision.models.video as video
from torch import nn
from torchvision.models import get_model_weights, swin_t
from torchvision.models.video import mvit
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from ogreg_core.errors import UsageError
from ogreg_core.models.attention_maps import attention_maps, received_by_pooled, received_in_windows
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.torchvision_models import build_torchvision, map_torchvision
from ogreg_core.models.weights import initialise
from ogreg_core.profiling import count_multiply_adds, count_parameters
from ogreg_core.training.memory import checkpoint_activations

MVITS = ["mvit_v1_b", "mvit_v2_s"]
SWINS = ["swin3d_t", "swin3d_s", "swin3d_b"]
CNNS = ["r2plus1d_18", "s3d"]
# One of each kind, and what is ours of each.
KINDS = ["swin3d_t", *MVITS, *CNNS]
OURS = ["swin3d_n", "mvit_v1_n", "mvit_v2_n", "r2plus1d_n", "s3d_n"]


def settings(name, **changes):
    """What torchvision's function hands to its MViT class, with changes."""
    with mock.patch.object(mvit, "MViT") as built:
        getattr(video, name)(num_classes=5)
    return {**built.call_args.kwargs, **changes}


def small(name, classes=5, **options):
    """Our model for clips of 8x32x32."""
    shape = {"frames": 8, "size": 32} if name.startswith("mvit") else {}
    return build_torchvision(name, classes, **shape, **options)


def reference(name, classes=5):
    """torchvision's model that takes clips of 8x32x32."""
    if name in MVITS:
        return mvit.MViT(**settings(name, spatial_size=(32, 32), temporal_size=8))
    return getattr(video, name)(num_classes=classes)


@pytest.fixture(scope="module", params=[*KINDS[:-1], pytest.param("s3d", marks=pytest.mark.slow)])
def pair(request):
    """torchvision's model and ours with the same weights, and a clip."""
    torch.manual_seed(1)
    theirs, ours = reference(request.param).eval(), small(request.param).eval()
    ours.load_state_dict(map_torchvision(theirs.state_dict()))
    # S3D's last pooling of torchvision needs 7x7 positions and 2 frames.
    shape = (1, 3, 16, 224, 224) if request.param == "s3d" else (2, 3, 8, 32, 32)
    return theirs, ours, torch.randn(shape)


def test_logits_are_torchvisions_to_the_bit(pair):
    theirs, ours, clip = pair
    with torch.no_grad():
        expected = theirs(clip)
        assert torch.equal(ours(clip), expected)
        assert torch.equal(ours.forward_with_maps(clip)[0], expected)


@pytest.mark.parametrize("shape", [(1, 33, 47), (5, 42, 50)], ids=str)
@pytest.mark.parametrize("name", ["swin3d_t", "r2plus1d_18"])
def test_odd_clips_too(name, shape):
    theirs, ours = reference(name).eval(), small(name).eval()
    ours.load_state_dict(map_torchvision(theirs.state_dict()))
    clip = torch.randn(1, 3, *shape)
    with torch.no_grad():
        assert torch.equal(ours(clip), theirs(clip))


@pytest.mark.slow
@pytest.mark.parametrize("name", MVITS)
def test_logits_at_full_size(name):
    theirs = getattr(video, name)(num_classes=5).eval()
    ours = build_torchvision(name, 5).eval()
    ours.load_state_dict(map_torchvision(theirs.state_dict()))
    clip = torch.randn(1, 3, 16, 224, 224)
    with torch.no_grad():
        assert torch.equal(ours(clip), theirs(clip))


@pytest.mark.parametrize("name", [*SWINS, *MVITS, *CNNS])
def test_names_and_shapes_are_torchvisions_but_for_the_head(name):
    with torch.device("meta"):
        theirs, ours = getattr(video, name)(num_classes=7), build_torchvision(name, 7)
    renamed = {"r2plus1d_18": ("fc.", "head."), "s3d": ("classifier.", "head.")}
    old, new = renamed.get(name, ("", ""))
    expected = {
        (new + key.removeprefix(old)) if old and key.startswith(old) else key: value.shape
        for key, value in theirs.state_dict().items()
    }
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected


@pytest.mark.parametrize(("thin", "name"), [("r2plus1d_n", "r2plus1d_18"), ("s3d_n", "s3d")])
def test_thin_networks_have_the_layers_of_torchvisions(thin, name):
    """Kernels, strides and paddings in the same order; three sixteenths and three eighths of channels."""
    with torch.device("meta"):
        found, whole = build_torchvision(thin, 5), build_torchvision(name, 5)
    layers = [
        [
            re.sub(r"(Conv3d|BatchNorm3d|Linear)\([^a-z]*(in_features=\d+)?", r"\1(", str(part))
            for part in model.modules()
            if not list(part.children())
        ]
        for model in (found, whole)
    ]
    # But for the share by which S3D's batch norms move.
    unlike = [pair for pair in zip(*layers, strict=True) if pair[0] != pair[1]]
    assert all("momentum=0.1" in ours and "momentum=0.001" in theirs for ours, theirs in unlike)
    assert bool(unlike) == (name == "s3d")
    share = 3 / 16 if name == "r2plus1d_18" else 3 / 8
    clip = torch.zeros(1, 3, 8, 32, 32, device="meta")
    widths = [[x.shape[-1] for x in model.eval().forward_stages(clip)] for model in (found, whole)]
    assert widths[0] == [share * width for width in widths[1]]


@pytest.mark.parametrize("name", MVITS)
def test_mvit_is_configured_as_torchvisions(name):
    with mock.patch("ogreg_core.models.torchvision_models.TorchvisionMViT") as built:
        build_torchvision(name, 5, drop_path=0.2, dropout=0.5)
    expected = settings(name, dropout=0.5)
    assert built.call_args.kwargs == expected


@pytest.mark.parametrize("name", OURS)
def test_protocol(name):
    model = small(name).eval()
    assert isinstance(model, VideoModel)
    assert model.num_classes == 5
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        logits = model(clip)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(model(clip[:1]), logits[:1], atol=1e-5, rtol=1e-5)
        stages = model.forward_stages(clip)
    assert len(stages) == len(model.stage_blocks()) == 4
    assert all(stage.ndim == 5 and len(stage) == 2 for stage in stages)
    assert all(a.shape[2] >= b.shape[2] for a, b in pairwise(stages))


@pytest.mark.parametrize("name", OURS)
def test_every_parameter_is_in_one_layer_and_gets_a_gradient(name):
    model = small(name).train()
    model(torch.randn(2, 3, 8, 32, 32)).logsumexp(1).sum().backward()
    layers = model.layers()
    assert layers[-1] == ["head"]
    for key, parameter in model.named_parameters():
        places = [
            number
            for number, layer in enumerate(layers)
            if any(key == prefix or key.startswith(f"{prefix}.") for prefix in layer)
        ]
        assert len(places) == 1, key
        assert (places[0] == len(layers) - 1) == key.startswith("head.")
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all()


def test_what_does_not_decay():
    with torch.device("meta"):
        exempt = {name: small(name).no_weight_decay() for name in KINDS}
    assert "features.0.0.attn.relative_position_bias_table" in exempt["swin3d_t"]
    assert "pos_encoding.spatial_pos" in exempt["mvit_v1_b"]
    assert "blocks.3.attn.rel_pos_t" in exempt["mvit_v2_s"]
    assert "layer1.0.conv1.1.weight" in exempt["r2plus1d_18"]
    assert "head.1.bias" in exempt["s3d"]
    assert not any(
        name.endswith(("qkv.weight", "head.weight")) for names in exempt.values() for name in names
    )


@pytest.mark.parametrize("name", ["swin3d_n", "mvit_v2_n", "r2plus1d_n"])
def test_recomputed_activations_make_the_same_step(name):
    torch.manual_seed(0)
    model = small(name).train()
    clip = torch.randn(1, 3, 8, 32, 32)
    gradients, states = [], []
    for stages in ((), (1, 2, 3, 4)):
        twin = copy.deepcopy(model)
        checkpoint_activations(twin, stages)
        twin(clip).logsumexp(1).sum().backward()
        gradients.append({key: value.grad for key, value in twin.named_parameters()})
        states.append(twin.state_dict())
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
    # Running statistics of batch norms move once.
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_rates_arrive_where_they_belong():
    with torch.device("meta"):
        swin, v2, s3d, r2plus1d = (
            small("swin3d_t", drop_path=0.3, dropout=0.4),
            small("mvit_v2_s", drop_path=0.2, dropout=0.5),
            small("s3d", dropout=0.5),
            small("r2plus1d_18", dropout=0.1),
        )
    depths = [block.stochastic_depth.p for stage in swin.stage_blocks() for block in stage]
    assert depths == pytest.approx([0.3 * n / 11 for n in range(12)])
    assert swin.dropout.p == 0.4
    assert v2.blocks[-1].stochastic_depth.p == pytest.approx(0.2)
    assert v2.head[0].p == s3d.head[0].p == 0.5
    assert r2plus1d.dropout.p == 0.1


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("s3d", {"drop_path": 0.1}, "drop_path"),
        ("r2plus1d_18", {"drop_path": 0.1}, "drop_path"),
        ("mvit_v1_b", {"window": 16}, "window"),
        ("s3d_n", {"stem": "conv"}, "stem"),
        ("swin3d_t", {"frames": 16}, "frames"),
        ("mvit_v2_s", {"frames": 7, "size": 32}, "7x32x32"),
        ("mvit_v2_s", {"frames": 8, "size": 34}, "8x34x34"),
    ],
)
def test_what_a_model_has_not_is_refused(name, options, word):
    with pytest.raises(UsageError, match=word):
        build_torchvision(name, 5, **options)


def test_clips_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="16x32x32 does not fit"):
        small("mvit_v1_b")(torch.zeros(1, 3, 16, 32, 32))
    with pytest.raises(UsageError, match="4 frames"):
        small("s3d")(torch.zeros(1, 3, 4, 32, 32))


def test_s3d_pools_what_there_is_of_a_small_clip():
    model = small("s3d").eval()
    clip = torch.randn(1, 3, 5, 40, 72)
    with torch.no_grad():
        features = model.features(clip)
        assert features.shape[2:] == (1, 1, 2)
        expected = F.linear(
            features.mean((2, 3, 4)), model.head[1].weight.flatten(1), model.head[1].bias
        )
        torch.testing.assert_close(model(clip), expected)


@pytest.mark.parametrize("shape", [(2, 32, 32), (6, 64, 64)], ids=str)
@pytest.mark.parametrize("name", MVITS)
def test_mvit_for_other_clips(name, shape):
    model = build_torchvision(name, 5, frames=shape[0], size=shape[1]).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *shape)).isfinite().all()


def test_window_of_sixteen_frames():
    with torch.device("meta"):
        wide = build_torchvision("swin3d_b", 174, window=16)
    table = wide.get_parameter("features.0.1.attn.relative_position_bias_table")
    assert table.shape == (31 * 13 * 13, 4)
    assert wide.features[0][1].attn.shift_size == [8, 3, 3]


# --- maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 7, 5), (2, 3, 8), (5, 2, 6)], ids=str)
@pytest.mark.parametrize("shift", [[0, 0, 0], [1, 1, 2]], ids=str)
def test_attention_received_in_windows_by_probing(grid, shift):
    """Queries and keys see the first half of the channels, values one of the second: a unit at a token
    there adds to the outputs the attention that this token receives.
    """
    torch.manual_seed(3)
    attention = ShiftedWindowAttention3d(8, [2, 3, 4], shift, num_heads=2).double()
    with torch.no_grad():
        weight = torch.randn(24, 8).double()
        weight[:16, 4:] = 0
        weight[16:] = torch.eye(8)[4]
        attention.qkv.weight.copy_(weight)
        attention.qkv.bias.copy_(torch.randn(24))
        attention.relative_position_bias_table.copy_(
            torch.randn_like(attention.relative_position_bias_table)
        )
        attention.proj.weight.copy_(torch.eye(8))
    x = torch.randn(1, *grid, 8).double()
    got = torch.zeros(grid).double()
    with torch.no_grad():
        base = attention(x)
        for t, h, w in torch.cartesian_prod(*(torch.arange(n) for n in grid)).tolist():
            probe = x.clone()
            probe[0, t, h, w, 4] += 1
            got[t, h, w] = (attention(probe) - base).mean(-1).sum()
        with attention_maps({"a": attention}, window_reader) as maps:
            attention(x)
    expected = (got / got.sum()).float()
    torch.testing.assert_close(maps["a"].glance[0], expected, atol=1e-6, rtol=1e-5)


def window_reader(module, arguments, weights):
    return received_in_windows(
        weights, tuple(arguments[0].shape[1:4]), module.window_size, module.shift_size
    )


class Values(nn.Module):
    """In place of the pooling of values: the values to use."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def forward(self, v, grid):
        return self.values, grid


@pytest.mark.parametrize("name", MVITS)
def test_attention_received_by_pooled_keys_by_probing(name):
    """One value after the other is one, all others zero: the output is the attention to it."""
    torch.manual_seed(4)
    attention = small(name).double().eval().blocks[2].attn
    grid, keys = (4, 4, 4), (4, 1, 1)
    x = torch.randn(1, 65, attention.embed_dim).double()
    seen = []
    with attention_maps({"a": attention}, lambda _m, _a, w: seen.append(w) or w), torch.no_grad():
        attention(x, grid)
    assert seen[0].shape == (1, 2, 65, 5)
    probe = copy.deepcopy(attention)
    probe.project = nn.Identity()
    got = []
    with torch.no_grad():
        for key in range(-1, 5):
            values = torch.zeros(1, 2, 5, probe.head_dim).double()
            if key >= 0:
                values[:, :, key] = 1
            probe.pool_v = Values(values)
            got.append(probe(x, grid)[0].sum(1).mean())
    expected = torch.stack(got[2:]) - got[0]
    found = received_by_pooled(seen[0], keys, keys)[0].flatten()
    torch.testing.assert_close(found, (expected / expected.sum()).float())
    larger = received_by_pooled(seen[0], keys, grid)
    assert larger.shape == (1, *grid)
    torch.testing.assert_close(larger.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("name", OURS[:3])
def test_maps_of_every_block(name):
    model = small(name).eval()
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.inference_mode():
        logits, maps = model.forward_with_maps(clip)
        assert torch.equal(logits, model(clip))
    depths = [len(stage) for stage in model.stage_blocks()]
    assert list(maps) == [
        f"stage{s}.block{b + 1}" for s, n in enumerate(depths, 1) for b in range(n)
    ]
    assert maps["stage1.block1"].glance.shape == (2, 4, 8, 8)
    for found in maps.values():
        assert found.gaze is None
        torch.testing.assert_close(found.glance.sum((1, 2, 3)), torch.ones(2))
        assert (found.glance >= 0).all()
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_of_a_convolutional_network_are_the_norms_of_its_activations():
    model = small("r2plus1d_18").eval()
    kept = {}
    model.layer3.register_forward_hook(lambda _m, _a, out: kept.setdefault("layer3", out))
    clip = torch.randn(1, 3, 8, 32, 32)
    logits, maps = model.forward_with_maps(clip)
    # Only its blocks are run, so the layer itself sees nothing.
    assert not kept
    with torch.no_grad():
        features = model.layer3(model.layer2(model.layer1(model.stem(clip))))
        assert torch.equal(logits, model(clip))
    assert list(maps) == ["stage1", "stage2", "stage3", "stage4"]
    assert maps["stage3"].glance is None
    torch.testing.assert_close(maps["stage3"].gaze, features.square().sum(1).sqrt())


# --- foreign checkpoints -----------------------------------------------------------------------


def swin_official(state):
    """torchvision's names of a video Swin to those of its authors."""
    renamed = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "features":
            number = int(parts[1])
            place = ["blocks", *parts[2:]] if number % 2 == 0 else ["downsample", *parts[2:]]
            key = ".".join(["layers", str(number // 2), *place])
        key = key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        head = key.startswith("head.")
        renamed[key.replace("head.", "cls_head.fc_cls.") if head else f"backbone.{key}"] = tensor
    return renamed


def test_official_video_swin():
    state = video.swin3d_t(num_classes=5).state_dict()
    official = swin_official(state)
    assert "backbone.layers.2.blocks.5.mlp.fc2.bias" in official
    assert "backbone.layers.0.downsample.reduction.weight" in official
    mapped = map_torchvision(official)
    assert set(mapped) == set(state)
    assert all(torch.equal(mapped[key], state[key]) for key in state)


def test_image_swin_is_inflated():
    image = swin_t(num_classes=1000)
    model = build_torchvision("swin3d_t", 5)
    report = initialise(model, map_torchvision(image.state_dict()), "swin_t")
    assert report.inflated == ["patch_embed.proj.weight"]
    assert report.other_classes == ["head.weight", "head.bias"]
    assert not report.unexpected
    assert not report.mismatched
    # The index of relative positions is no weight: it stays as built.
    assert len(report.missing) == 12
    assert all(name.endswith("relative_position_index") for name in report.missing)
    found = model.features[2][1].attn.relative_position_bias_table.unflatten(0, (15, 169))
    expected = image.features[3][1].attn.relative_position_bias_table
    assert all(torch.equal(found[offset], expected) for offset in range(15))


OFFICIAL_MVIT = [
    ("pos_encoding.class_token", "cls_token"),
    ("pos_encoding.class_pos", "pos_embed_class"),
    ("pos_encoding.spatial_pos", "pos_embed_spatial"),
    ("pos_encoding.temporal_pos", "pos_embed_temporal"),
    ("conv_proj.", "patch_embed.proj."),
    (".project.0.", ".proj."),
    (".project.", ".proj."),
    (".norm_act.0.", "."),
    (".pool.weight", ".weight"),
    ("mlp.0.", "mlp.fc1."),
    ("mlp.3.", "mlp.fc2."),
    ("head.1.", "head.projection."),
]


@pytest.mark.parametrize("name", MVITS)
def test_official_mvit(name):
    state = small(name).state_dict()
    official = {}
    for key, tensor in state.items():
        renamed = key
        if ".norm_act.0." in key:
            renamed = renamed.replace("pool_", "norm_")
        for ours, theirs in OFFICIAL_MVIT:
            renamed = renamed.replace(ours, theirs)
        if renamed.startswith(("cls_", "pos_embed")):
            tensor = tensor.view(1, *((1,) if tensor.ndim == 1 else ()), *tensor.shape)
        official[renamed] = tensor
    assert "blocks.3.attn.pool_k.weight" in official
    assert "blocks.3.attn.norm_k.bias" in official
    assert "blocks.3.attn.proj.weight" in official
    assert official["cls_token"].shape == (1, 1, 96)
    mapped = map_torchvision(official)
    assert set(mapped) == set(state)
    assert all(torch.equal(mapped[key], state[key]) for key in state)


# --- costs, precision, compilation -------------------------------------------------------------

# Frames, size, multiply-adds in G: torchvision's own figure, which leaves norms out, and the one of
# the field's tables where there is one for these clips.
COSTS = [
    ("swin3d_t", 16, 224, 43.882, None),
    ("mvit_v1_b", 16, 224, 70.599, 70.6),
    ("mvit_v2_s", 16, 224, 64.224, 64.5),
    ("r2plus1d_18", 16, 112, 40.519, None),
    ("s3d", 16, 224, 17.979, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames", "size", "bare", "published"), COSTS)
def test_costs_are_the_published_ones(name, frames, size, bare, published):
    meta = get_model_weights(name).DEFAULT.meta
    model = build_torchvision(name, 400)
    assert count_parameters(model) == meta["num_params"]
    report = count_multiply_adds(model, torch.zeros(1, 3, frames, size, size))
    norms = sum(report.by_operator.get(kind, 0) for kind in ("layer_norm", "batch_norm"))
    if bare is not None:
        assert meta["_ops"] == bare
        assert (report.total - norms) / 1e9 == pytest.approx(bare, rel=1e-3)
    if published is not None:
        assert report.total / 1e9 == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name", OURS)
def test_bf16_is_close(name):
    torch.manual_seed(0)
    model = small(name).eval()
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        expected = model(clip)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(clip)
    assert found.isfinite().all()
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 0.05 * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_the_graph_is_captured(name):
    model = small(name).eval()
    clip = torch.randn(1, 3, 8, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name in OURS[3:])
    with torch.no_grad():
        torch.testing.assert_close(compiled(clip), model(clip), atol=1e-4, rtol=1e-4)
