"""The ablations of OG-ReG against loops over their formulas, torch's own modules, and the model itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ogreg_core.errors import UsageError
from ogreg_core.gaze.geometry import reduction_of
from ogreg_core.gaze.glance import glance_of
from ogreg_core.models.gaze_forms import FORMS, SIMILARITIES
from ogreg_core.models.layers import split_heads
from ogreg_core.models.mdconv import MDConv, modulation
from ogreg_core.models.ogreg import SoDA
from ogreg_core.models.ogreg_ablation import Choices, GlanceForm, rotary_angles, rotate
from ogreg_core.models.registry import MODELS, create_model
from ogreg_core.profiling import count_multiply_adds, count_parameters
from ogreg_core.profiling.counting import observe

NAME = "ogreg-n-ablation"
OPTIONS = {
    option: values for option, values in MODELS[NAME].options.items() if isinstance(values, tuple)
}
# Of numbers one other.
OTHERWISE = [
    {option: value}
    for option, values in OPTIONS.items()
    for value in (values[1:2] if type(values[0]) is int else values[1:])
]


def words(choices: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in choices.items()) or "default"


def small_model(name: str = NAME, **options) -> nn.Module:
    torch.manual_seed(1)
    options = {"strides": (4, 2, 1, 1), **options}
    return create_model(name, 5, **options).eval()


class TestTheModelItself:
    @pytest.mark.parametrize("stem", ["conv", "patch"])
    def test_without_choices_it_is_ogreg_to_the_bit(self, stem):
        ours, model = small_model(stem=stem), small_model("ogreg-n", stem=stem)
        expected = model.state_dict()
        assert list(ours.state_dict()) == list(expected)
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
        clip = torch.randn(2, 3, 6, 40, 36)
        with torch.no_grad():
            assert torch.equal(ours(clip), model(clip))

    def test_the_first_value_of_every_option_is_todays(self):
        default = Choices()
        firsts = {name: values[0] for name, values in OPTIONS.items() if name != "stem"}
        assert firsts == {name: getattr(default, name) for name in firsts}
        assert set(FORMS) | {"2d", "3d", "none"} == set(OPTIONS["gaze"])
        assert list(SIMILARITIES) == list(OPTIONS["similarity"])

    @pytest.mark.parametrize(
        "choices", [{"gaze": "2d"}, {"gaze": "3d"}, {"similarity": "frame"}], ids=words
    )
    def test_choices_that_the_model_has_itself(self, choices):
        ours, model = small_model(**choices), small_model("ogreg-n", **choices)
        clip = torch.randn(1, 3, 4, 32, 32)
        with torch.no_grad():
            assert torch.equal(ours(clip), model(clip))

    @pytest.mark.parametrize("choices", [{}, *OTHERWISE], ids=words)
    def test_every_choice_trains_maps_and_does_something(self, choices):
        model = small_model(**choices)
        clip = torch.randn(2, 3, 5, 34, 40)
        logits = model(clip)
        logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        seen, maps = model.forward_with_maps(clip)
        torch.testing.assert_close(seen, logits.detach())
        assert len(maps) == 6
        for found in maps.values():
            assert (found.gaze is None) == (choices.get("gaze") == "none")
            assert (found.glance is None) == (choices.get("glance") == "none")
            if found.gaze is not None:
                assert found.gaze.shape[:2] == (2, 2)
                assert found.profiles["m"].shape == found.profiles["d"].shape == (2, 2)
        with torch.no_grad():
            assert model(clip[:, :, :1]).isfinite().all()

    @pytest.mark.parametrize("choices", OTHERWISE, ids=words)
    def test_every_choice_changes_the_network(self, choices):
        plain, model = small_model(), small_model(**choices)
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        # Of what has another beginning.
        own = ("sharpness", "offset", *(["gaze.weight"] if "gaze_spread" in choices else []))
        same = {
            name: value
            for name, value in plain.state_dict().items()
            if shapes.get(name) == value.shape and not name.endswith(own)
        }
        model.load_state_dict(same, strict=False)
        # Little moves, so that no modulation is saturated.
        clip = torch.randn(1, 3, 1, 34, 40) + 0.1 * torch.randn(1, 3, 6, 34, 40)
        with torch.no_grad():
            alike = torch.allclose(plain(clip), model(clip), rtol=1e-6, atol=1e-7)
        others = {name: value.shape for name, value in plain.state_dict().items()}
        assert not alike or shapes != others


@pytest.mark.parametrize(("option", "value"), [("sharpness", 60), ("offset", -4)])
def test_where_listening_starts(option, value):
    gaze = small_model(**{option: value}).stages[1][0].gaze
    assert type(gaze) is MDConv, "its kernels still serve"
    assert set(getattr(gaze, option).tolist()) == {value}


@pytest.mark.parametrize("gaze", ["modulated", "3d", "mixed"])
def test_kernels_begin_larger_and_nothing_else_changes(gaze):
    plain, spread = (small_model(gaze=gaze, gaze_spread=factor) for factor in (1, 4))
    values = spread.state_dict()
    for name, value in plain.state_dict().items():
        is_kernel = name.endswith(("gaze.weight", "gaze.flat"))
        assert torch.equal(values[name], 4 * value if is_kernel else value), name


class TestListeningToTheStem:
    @pytest.mark.parametrize("similarity", ["position", "pooled"])
    def test_blocks_hear_the_stem_averaged_onto_their_grid(self, similarity):
        model = small_model(listens="stem", similarity=similarity)
        clip = torch.randn(2, 3, 6, 32, 64)
        with torch.no_grad():
            _, maps = model.forward_with_maps(clip)
            d = SIMILARITIES[similarity](model.stem(clip))[..., 0]
        coarse = d if similarity == "pooled" else F.avg_pool2d(d, 4)
        expected = coarse.expand_as(maps["stage3.block1"].gaze)
        torch.testing.assert_close(maps["stage3.block1"].gaze, expected)
        gaze = model.stages[2][0].gaze
        m = modulation(coarse, gaze.sharpness, gaze.offset)
        torch.testing.assert_close(maps["stage3.block1"].profiles["m"], m.mean((2, 3, 4)))

    def test_gradients_pass_through_what_is_heard(self):
        model = small_model(listens="stem", stem="patch")
        # The stem's norm forgets scale, so the sum of its features is no loss.
        model(torch.randn(2, 3, 6, 32, 32)).square().sum().backward()
        assert model.stem.proj.weight.grad.abs().sum() > 0

    def test_copies_do_not_share_what_they_hear(self):
        model = small_model(listens="stem")
        clip = torch.randn(1, 3, 4, 32, 32)
        expected = model(clip)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(clip), expected)
        assert twin.heard is twin.stages[0][0].gaze.heard
        assert twin.heard is not model.heard

    def test_token_selection_is_refused(self):
        keep = {"time": [{"before": 1, "ratio": 0.5}]}
        model = small_model(listens="stem", token_selection=keep)
        with pytest.raises(UsageError, match="listens") as caught:
            model(torch.randn(1, 3, 8, 32, 32))
        assert "token selection" in caught.value.why


def test_layer_norm_of_the_stem_is_that_of_the_convolutions_by_themselves():
    model, clip = small_model(stem_norm="layer"), torch.randn(2, 3, 6, 36, 40)
    stem = model.stem
    with torch.no_grad():
        stem.bn1.weight.normal_()
        stem.bn1.bias.normal_()
        repeated = torch.cat([clip[:, :, :1], clip], dim=2)
        x = F.conv3d(repeated, stem.conv1.weight, stride=2, padding=(0, 1, 1))
        mean, spread = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        shape = (1, -1, 1, 1, 1)
        x = (x - mean) / (spread + 1e-5).sqrt() * stem.bn1.weight.view(shape)
        x = F.gelu(x + stem.bn1.bias.view(shape))
        x = stem.norm(stem.conv2(x).permute(0, 2, 3, 4, 1))
        torch.testing.assert_close(stem(clip), x, atol=1e-5, rtol=1e-4)


class TestGlance:
    def test_rotary_against_complex_numbers(self):
        grid, pairs = (3, 4, 5), 8
        angles = rotary_angles(grid, pairs, torch.device("cpu"))
        tokens = torch.randn(2, 60, 3, 2 * pairs)
        found = rotate(tokens, angles)
        for number, (t, row, column) in enumerate(
            (t, row, column) for t in range(3) for row in range(4) for column in range(5)
        ):
            turn = [t * 100 ** -(i / 4) for i in range(4)]
            turn += [row * 100 ** -(i / 2) for i in range(2)]
            turn += [column * 100 ** -(i / 2) for i in range(2)]
            pair = torch.complex(tokens[:, number, :, :pairs], tokens[:, number, :, pairs:])
            turned = pair * torch.polar(torch.ones(pairs), torch.tensor(turn))
            expected = torch.cat([turned.real, turned.imag], dim=-1)
            torch.testing.assert_close(found[:, number], expected, atol=1e-5, rtol=1e-5)

    def test_rotary_attention_depends_on_distance_alone(self):
        """Equal features everywhere: the score of two cells is that of two others as far apart, on
        another grid too.
        """
        layer = GlanceForm(32, 2, 1, Choices(position="rotary"))
        token = torch.randn(32)

        def scores(t, h, w):
            qkv = layer.project(token.expand(1, t, h, w, 32))
            query, key, _ = split_heads(qkv, 2)
            return (query @ key.transpose(-2, -1)).view(2, t, h, w, t, h, w)

        small, large = scores(3, 4, 4), scores(5, 6, 7)
        torch.testing.assert_close(
            small[:, :2, :3, :3, 1:, 1:, 1:], large[:, 1:3, 2:5, 3:6, 2:4, 3:6, 4:7]
        )
        assert small.std() > 1e-4 * small.abs().mean()

    def test_rotary_leaves_values_alone(self):
        layer, plain = (
            GlanceForm(32, 1, 1, Choices(position="rotary")),
            SoDA(32, 1, 1, position=False),
        )
        plain.load_state_dict(layer.state_dict())
        y = torch.randn(2, 2, 3, 3, 32)
        ours, expected = layer.project(y), plain.project(y)
        torch.testing.assert_close(ours[..., 64:], expected[..., 64:])
        torch.testing.assert_close(ours[:, 0], expected[:, 0])
        assert not torch.allclose(ours[:, 1:, :64], expected[:, 1:, :64])

    def test_no_encoding_does_not_know_where_a_token_lies(self):
        layer = GlanceForm(8, 2, 1, Choices(position="none"))
        y = torch.randn(1, 2, 3, 3, 8)
        torch.testing.assert_close(layer(y.flip(1, 3)), layer(y).flip(1, 3))
        assert layer.position is None

    def test_strided_pooling_starts_as_the_average_and_is_a_strided_convolution(self):
        layer = GlanceForm(6, 1, 2, Choices(pooling="strided"))
        layer.init_weights()
        y = torch.randn(2, 3, 4, 6, 6)
        averaged = y.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
        images = y.flatten(0, 1).permute(0, 3, 1, 2)
        expected = averaged.flatten(0, 1).permute(0, 3, 1, 2)
        torch.testing.assert_close(layer.pool(images), expected)
        nn.init.normal_(layer.reduction.weight)
        images = torch.randn(2, 6, 5, 6)
        padded = torch.cat([images, images[:, :, -1:]], dim=2)
        expected = F.conv2d(padded, layer.reduction.weight, stride=2, groups=6)
        torch.testing.assert_close(layer.pool(images), expected)

    def test_nearest_repeats_each_cell(self):
        layer = GlanceForm(4, 1, 4, Choices(interpolation="nearest"))
        images = torch.randn(2, 4, 2, 3)
        expected = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        assert torch.equal(layer.unpool(images), expected)


class TestBlock:
    def test_without_glance_there_is_no_attention(self):
        model = small_model(glance="none")
        assert not any("qkv" in name or "glance" in name for name, _ in model.named_parameters())
        block, y = model.stages[0][0], torch.randn(1, 4, 6, 6, 32)
        torch.testing.assert_close(block.look(y), block.gaze(y))
        clip = torch.randn(1, 3, 4, 32, 32)
        with pytest.raises(UsageError, match="no Glance"):
            glance_of(model, clip, "rollout", ["stage1.block1"], reduction_of(NAME, {}))

    def test_without_gaze_there_is_no_convolution_of_it(self):
        model = small_model(gaze="none")
        assert not any("gaze" in name for name, _ in model.named_parameters())
        block, y = model.stages[0][0], torch.randn(1, 4, 6, 6, 32)
        torch.testing.assert_close(block.look(y), block.glance(y))

    def test_split_gives_each_path_half_of_the_channels(self):
        block = small_model(fusion="split").stages[2][0]
        assert block.gaze.weight.shape[0] == block.glance.qkv.in_features == 64
        assert block.glance.heads == 2
        y = torch.randn(1, 3, 4, 4, 128)
        seen = block.look(y)
        torch.testing.assert_close(seen[..., :64], block.glance(y[..., :64]))
        torch.testing.assert_close(seen[..., 64:], block.gaze(y[..., 64:]))

    def test_split_costs_as_much(self):
        with torch.device("meta"):
            clip = torch.zeros(1, 3, 16, 48, 48)
            costs = {
                fusion: observe(small_model(fusion=fusion), clip).multiply_adds
                for fusion in ("sum", "split")
            }
        assert costs["split"] == pytest.approx(costs["sum"], rel=0.05)

    def test_learnt_scales_start_at_one_and_scale_their_path(self):
        block = small_model(fusion="learnt").stages[1][0]
        y = torch.randn(1, 3, 4, 4, 64)
        glance, gaze = block.glance(y), block.gaze(y)
        torch.testing.assert_close(block.look(y), glance + gaze)
        with torch.no_grad():
            block.glance_scale.fill_(2.0)
            block.gaze_scale[0] = -1.0
        expected = 2 * glance + gaze
        expected[..., 0] = 2 * glance[..., 0] - gaze[..., 0]
        torch.testing.assert_close(block.look(y), expected)
        assert "stages.1.0.glance_scale" in small_model(fusion="learnt").no_weight_decay()

    def test_the_projection_starts_as_a_rotation_before_the_gaze_alone(self):
        block = small_model(gaze_projection="linear").stages[0][0]
        y = torch.randn(1, 3, 4, 4, 32)
        weight, bias = block.gaze_projection.weight, block.gaze_projection.bias
        torch.testing.assert_close(weight @ weight.T, torch.eye(32), atol=1e-5, rtol=0)
        expected = block.glance(y) + block.gaze(y @ weight.T + bias)
        torch.testing.assert_close(block.look(y), expected)


class TestTheWhole:
    @pytest.mark.parametrize(
        "choices",
        [
            {"gaze": "difference", "similarity": "relative"},
            {"gaze": "gated", "similarity": "centred"},
            {"listens": "stem", "position": "rotary"},
            {"similarity": "channel", "pooling": "strided"},
        ],
        ids=words,
    )
    def test_a_still_clip_stays_still(self, choices):
        model = small_model(**choices)
        frame = torch.randn(1, 3, 1, 48, 40)
        _, maps = model.forward_with_maps(frame.expand(-1, -1, 8, -1, -1))
        for found in maps.values():
            assert found.gaze.abs().max() < 1e-3
            assert found.profiles["m"].abs().max() < 1e-2

    @pytest.mark.parametrize(
        "choices",
        [
            {"gaze": "mixed"},
            {"gaze": "excitation", "gaze_projection": "linear"},
            {"fusion": "split", "pooling": "strided", "position": "rotary"},
            {"glance": "none", "listens": "stem"},
        ],
        ids=words,
    )
    def test_costs_are_counted_and_two_counters_agree(self, choices):
        model = small_model(**choices)
        clip = torch.zeros(1, 3, 4, 32, 32)
        found, seen = count_multiply_adds(model, clip), observe(model, clip)
        assert found.products == seen.multiply_adds
        assert found.by_module["stages"] > 0

    def test_parameters(self):
        own = count_parameters(small_model("ogreg-n"))
        channels = 32 + 64 + 3 * 128 + 256
        assert count_parameters(small_model(gaze="none")) == own - channels * (27 + 1 + 2)
        assert count_parameters(small_model(gaze="mixed")) == own + channels * 9
        assert count_parameters(small_model(position="none")) == own - channels * (27 + 1)
        assert count_parameters(small_model(channels="fixed")) == own - 2 * channels


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"glance": "none", "gaze": "none"}, "both 'none'"),
        ({"gaze": "3d", "sharpness": 60}, "sharpness=60"),
        ({"gaze": "2d", "similarity": "frame"}, "similarity='frame'"),
        ({"gaze": "none", "fusion": "split"}, "fusion='split'"),
        ({"gaze": "excitation", "channels": "shared"}, "channels='shared'"),
        ({"glance": "none", "position": "rotary"}, "position='rotary'"),
        ({"similarity": "pooled", "modulation": "frame"}, "modulation='frame'"),
        ({"similarity": "channel", "listens": "stem"}, "listens='stem'"),
        ({"strides": (1, 1, 1, 1), "pooling": "strided"}, "pooling='strided'"),
        ({"stem": "patch", "stem_norm": "layer"}, "stem_norm='layer'"),
    ],
)
def test_choices_that_would_change_nothing_are_refused(options, what):
    with pytest.raises(UsageError, match=what) as caught:
        small_model(**options)
    assert caught.value.why
    assert "out of the recipe" in caught.value.fix


@pytest.mark.parametrize(
    ("option", "value"), [("sharpness", 7), ("sharpness", "30"), ("gaze", "4d"), ("offset", True)]
)
def test_values_that_there_are_not(option, value):
    with pytest.raises(UsageError, match=f"model option {option}"):
        small_model(**{option: value})
