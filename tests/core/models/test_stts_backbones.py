"""Token selection in its backbones: against the backbone on the chosen tokens, and the published counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import video
from torchvision.models.video.mvit import MSBlockConfig, MViT

from ogreg_core.errors import UsageError
from ogreg_core.models.ogreg import VARIANTS, build_ogreg
from ogreg_core.models.protocol import VideoModel
from ogreg_core.models.stts import Keep, Selection, top_k
from ogreg_core.models.stts_backbones import TokenSelecting, with_token_selection
from ogreg_core.models.torchvision_models import build_torchvision, map_torchvision
from ogreg_core.profiling import count_multiply_adds, count_parameters
from ogreg_core.training.memory import checkpoint_activations
from tests.thin import one_block_a_stage


def selection(
    time: dict[int, float] | None = None, space: dict[int, float] | None = None, **choices: object
) -> Selection:
    return Selection(
        tuple(Keep(*pair) for pair in (time or {}).items()),
        tuple(Keep(*pair) for pair in (space or {}).items()),
        **choices,
    )


def small_mvit() -> nn.Module:
    """Three blocks, the second of which halves the grid; 8x32x32 clips are 4x8x8 tokens."""
    widths, heads = [8, 16, 16], [1, 2, 2]
    blocks = [
        MSBlockConfig(
            num_heads=heads[i],
            input_channels=widths[max(i - 1, 0)] if i < 2 else 16,
            output_channels=widths[i],
            kernel_q=[3, 3, 3] if i == 1 else [],
            kernel_kv=[3, 3, 3],
            stride_q=[1, 2, 2] if i == 1 else [],
            stride_kv=[1, 2, 2],
        )
        for i in range(3)
    ]
    return MViT((32, 32), 8, blocks, False, False, False, False, dropout=0.0, num_classes=5)


def small_swin() -> nn.Module:
    return video.SwinTransformer3d(
        [2, 4, 4], 8, [1, 2], [2, 4], [2, 3, 3], stochastic_depth_prob=0.0, num_classes=5
    )


def small_ogreg() -> nn.Module:
    return build_ogreg("n", 5, stem="patch", strides=(2, 2, 1, 1))


BACKBONES = {"mvit": small_mvit, "swin": small_swin, "ogreg": small_ogreg}
PLACES = {"mvit": ({0: 0.6}, {2: 0.6}), "swin": ({0: 0.6}, {1: 0.6}), "ogreg": ({1: 0.6}, {2: 0.6})}
EACH = pytest.mark.parametrize("name", BACKBONES)


def backbone(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = BACKBONES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def selecting(name: str, **choices: object) -> TokenSelecting:
    return with_token_selection(backbone(name), selection(*PLACES[name], samples=20, **choices))


def clips(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 32, 32, generator=torch.Generator().manual_seed(4))


class TestEveryBackbone:
    @EACH
    @pytest.mark.parametrize("training", [False, True])
    def test_keeping_all_is_the_backbone(self, name, training):
        model = backbone(name)
        time, space = PLACES[name]
        whole = selection(dict.fromkeys(time, 1.0), dict.fromkeys(space, 1.0), samples=10)
        wrapped = with_token_selection(model, whole).train(training)
        model.train(training)
        torch.testing.assert_close(wrapped(clips()), model(clips()), atol=1e-5, rtol=1e-5)

    @EACH
    def test_selecting_nothing_is_the_backbone(self, name):
        wrapped = with_token_selection(backbone(name), Selection())
        torch.testing.assert_close(wrapped(clips()), backbone(name)(clips()), atol=1e-5, rtol=1e-5)

    @EACH
    @pytest.mark.parametrize("gradient", ["unbiased", "official"])
    def test_training_without_noise_is_the_test(self, name, gradient):
        model = selecting(name, gradient=gradient)
        expected = model(clips())
        model.train()
        assert not torch.allclose(model(clips()), expected, atol=1e-4)
        model.set_progress(1.0)
        torch.testing.assert_close(model(clips()), expected, atol=1e-5, rtol=1e-5)

    @EACH
    def test_answers_the_protocol(self, name):
        model = selecting(name)
        assert isinstance(model, VideoModel)
        assert model.num_classes == 5
        logits, maps = model.forward_with_maps(clips())
        assert torch.equal(logits, model(clips()))
        assert list(maps) == [
            f"time{next(iter(PLACES[name][0]))}",
            f"space{next(iter(PLACES[name][1]))}",
        ]
        stages = model.stage_blocks()
        assert len(model.forward_stages(clips())) == len(stages)
        prefixes = [prefix for layer in model.layers() for prefix in layer]
        assert model.layers()[-1] == ["head"]
        assert len(model.layers()) == sum(map(len, stages)) + 2
        for parameter, value in model.named_parameters():
            found = [p for p in prefixes if parameter == p or parameter.startswith(f"{p}.")]
            assert len(found) == 1, parameter
            assert value.ndim > 1 or parameter in model.no_weight_decay()

    @EACH
    def test_names_are_the_backbones_and_the_released_scorers(self, name):
        model, wrapped = backbone(name), selecting(name)
        own, found = set(model.state_dict()), set(wrapped.state_dict())
        assert own <= found
        assert {".".join(key.split(".")[:3]) for key in found - own} == {
            "time_score_predictor.0.score_network",
            "space_score_predictor.0.score_network",
        }

    @EACH
    def test_gradients_reach_every_parameter(self, name):
        model = selecting(name).train()
        # Frames that are alike, because OG-ReG's modulation saturates where they are not.
        model(clips()[:, :, :1] + 0.1 * clips()).square().sum().backward()
        for parameter, value in model.named_parameters():
            assert value.grad is not None, parameter
            # Scores are normalised: their last bias shifts nothing.
            if not parameter.endswith("out_conv.4.bias"):
                assert value.grad.abs().sum() > 0, parameter

    @EACH
    def test_noise_of_a_clip_does_not_depend_on_the_size_of_the_batch(self, name):
        model = selecting(name).train()
        results = []
        for batch in (1, 3):
            torch.manual_seed(7)
            results.append(model(clips(3)[:batch])[0])
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
        torch.manual_seed(8)
        assert not torch.allclose(model(clips(1))[0], results[0], atol=1e-4)

    @EACH
    def test_noise_of_two_clips_differs(self, name):
        model = selecting(name).train()
        torch.manual_seed(7)
        twice = model(clips(1).repeat(2, 1, 1, 1, 1))
        assert not torch.allclose(twice[0], twice[1], atol=1e-5)

    @EACH
    def test_recomputed_activations_give_the_same_gradients(self, name):
        model = selecting(name).train()
        other = copy.deepcopy(model)
        checkpoint_activations(other, range(1, len(other.stage_blocks()) + 1))
        for each in (model, other):
            torch.manual_seed(5)
            each(clips()).square().sum().backward()
        for (parameter, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), parameter

    @EACH
    def test_sixteen_bits(self, name):
        model = selecting(name)
        expected = model(clips())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(clips())
            model.train()
            model(clips()).float().square().sum().backward()
        assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    @pytest.mark.slow
    @EACH
    def test_compiles_into_one_graph_that_lasts_while_the_noise_fades(self, name, monkeypatch):
        one_block_a_stage(monkeypatch, VARIANTS)
        # Backward passes are of the same selection in all; the quickest has its own compiled too.
        backend = "aot_eager" if name == "swin" else "eager"
        model = selecting(name).train()
        torch.manual_seed(3)
        expected = model(clips())
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for share in (0.5, 0.75, 0.0):
                model.set_progress(share)
                torch.manual_seed(3)
                found = compiled(clips())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class TestProgress:
    def test_noise_fades_linearly(self):
        model = selecting("ogreg", sigma=0.2)
        for share, sigma in ((0.0, 0.2), (0.25, 0.15), (1.0, 0.0)):
            model.set_progress(share)
            assert model.sigma.item() == pytest.approx(sigma)
        assert "sigma" not in model.state_dict()

    @pytest.mark.parametrize("share", [-0.1, 1.1])
    def test_no_share(self, share):
        with pytest.raises(ValueError, match="share"):
            selecting("ogreg").set_progress(share)


class TestMViT:
    def test_token_counts_are_the_published_ones(self):
        """stts: 5 of 8 frames from block 0 on, windows of 13x13 from block 4 on."""
        with torch.device("meta"):
            model = with_token_selection(
                video.mvit_v1_b(), selection({0: 0.625}, {4: 0.863})
            ).eval()
            clip = torch.zeros(1, 3, 16, 224, 224)
        found = []
        for block in model.blocks:
            block.register_forward_hook(
                lambda _m, _i, out: found.append((out[0].shape[1], out[0].shape[2], out[1]))
            )
        model(clip)
        fine, middle, coarse = (5, 56, 56), (5, 28, 28), (5, 14, 14)
        assert found == [
            (15681, 192, fine),
            (3921, 192, middle),
            (3921, 384, middle),
            (981, 384, coarse),
            *[(846, 384, (5, 13, 13))] * 9,
            (846, 768, (5, 13, 13)),
            *[(246, 768, (5, 7, 7))] * 2,
        ]
        assert [tuple(x.shape[1:]) for x in model.forward_stages(clip)] == [
            (*fine, 192),
            (*middle, 384),
            (5, 13, 13, 768),
            (5, 7, 7, 768),
        ]
        assert count_parameters(model) == 36_912_498

    def test_class_token_stays_and_frames_keep_their_position_codes(self):
        model = with_token_selection(backbone("mvit"), selection({0: 0.5}))
        inputs = []
        model.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given))
        model(clips())
        x = model.pos_encoding(model.conv_proj(clips()).flatten(2).transpose(1, 2))
        frames = x[:, 1:].unflatten(1, (4, 8, 8))
        chosen = top_k(model.time_score_predictor[0].scores(frames), 2)
        expected = torch.stack([frames[n, chosen[n]] for n in range(2)])
        tokens, grid = inputs[0]
        assert tuple(grid) == (2, 8, 8)
        assert torch.equal(tokens[:, 0], x[:, 0])
        assert torch.equal(tokens[:, 1:], expected.flatten(1, 3))

    @pytest.mark.slow
    def test_second_version_runs_too(self):
        model = build_torchvision("mvit_v2_s", 3, frames=4, size=64).eval()
        wrapped = with_token_selection(model, selection({0: 0.5}, {4: 0.6}))
        assert wrapped(torch.zeros(1, 3, 4, 64, 64)).shape == (1, 3)
        same = with_token_selection(model, Selection())
        clip = torch.randn(1, 3, 4, 64, 64)
        torch.testing.assert_close(same(clip), model(clip))

    def test_clips_of_another_size_are_refused(self):
        with pytest.raises(UsageError, match="does not fit"):
            selecting("mvit")(torch.zeros(1, 3, 8, 32, 36))

    def test_released_names_find_their_place(self):
        """The backbone's map takes care of the backbone and leaves the scorers alone."""
        name = "space_score_predictor.0.score_network.in_conv.1.weight"
        found = map_torchvision({"cls_token": torch.zeros(1, 1, 8), name: torch.ones(8, 8)})
        assert set(found) == {"pos_encoding.class_token", name}


class TestSwin:
    def test_equals_the_backbone_on_the_chosen_frames(self):
        model = with_token_selection(backbone("swin"), selection({0: 0.75}))
        whole = backbone("swin")
        x = whole.patch_embed(clips())
        chosen = top_k(model.time_score_predictor[0].scores(x), 3)
        x = torch.stack([x[n, chosen[n]] for n in range(2)])
        expected = whole.head(whole.norm(whole.features(x)).mean((1, 2, 3)))
        torch.testing.assert_close(model(clips()), expected, atol=1e-5, rtol=1e-5)

    def test_our_own_wrapper_and_its_dropout(self):
        whole = build_torchvision("swin3d_t", 3, dropout=0.5).eval()
        model = with_token_selection(whole, Selection())
        clip = torch.randn(1, 3, 4, 32, 32)
        torch.testing.assert_close(model(clip), whole(clip), atol=1e-5, rtol=1e-5)
        assert model.dropout.p == 0.5
        model.train()
        torch.manual_seed(0)
        found = model(clip)
        torch.manual_seed(0)
        torch.testing.assert_close(found, whole.train()(clip), atol=1e-5, rtol=1e-5)

    def test_parameters_are_the_published_ones(self):
        with torch.device("meta"):
            model = with_token_selection(video.swin3d_b(), selection({0: 0.625}))
        assert count_parameters(model) - count_parameters(model.head) == 87_746_505

    def test_released_names_find_their_place(self):
        name = "time_score_predictor.0.score_network.out_conv.4.bias"
        patch = "patch_embed.proj.weight"
        found = map_torchvision({f"backbone.{key}": torch.zeros(1) for key in (patch, name)})
        assert set(found) == {patch, name}


class TestOGReG:
    def test_windows_leave_a_dense_rectangle_of_any_picture(self):
        model = selecting("ogreg")
        for frames, height, width in ((8, 64, 64), (7, 50, 90), (1, 32, 32)):
            stages = model.forward_stages(torch.randn(1, 3, frames, height, width))
            before, after = stages[1].shape, stages[2].shape
            kept = -(-frames // 2)
            assert before[1] == after[1] == max(1, int(kept * 0.6))
            rows, columns = (before[2] + 1) // 2, (before[3] + 1) // 2
            assert after[2] * after[3] <= max(1, 0.6 * rows * columns)
            assert model(torch.randn(1, 3, frames, height, width)).isfinite().all()

    def test_equals_the_stages_on_the_chosen_tokens(self):
        model, whole = selecting("ogreg"), backbone("ogreg")
        clip = torch.randn(1, 3, 8, 96, 96)
        x = whole.merges[0](whole.stages[0](whole.stem(clip)))
        chosen = top_k(model.time_score_predictor[0].scores(x), 2)[0]
        x = whole.merges[1](whole.stages[1](x[:, chosen]))
        # 6x6 positions of which 0.6 are 4x4: nine windows.
        tokens = model.space_score_predictor[0].score_network(x.flatten(2, 3).flatten(0, 1))
        scores = tokens.view(2, 1, 6, 6).unfold(2, 4, 1).unfold(3, 4, 1).mean((4, 5)).flatten(1)
        best = [divmod(int(i), 3) for i in scores.argmax(1)]
        x = torch.stack([x[0, t, y : y + 4, z : z + 4] for t, (y, z) in enumerate(best)])[None]
        x = whole.stages[3](whole.merges[2](whole.stages[2](x)))
        expected = whole.head(whole.norm(x).mean((1, 2, 3)))
        torch.testing.assert_close(model(clip), expected, atol=1e-5, rtol=1e-5)


class TestMaps:
    @EACH
    def test_show_the_tokens_that_are_left(self, name):
        model = selecting(name)
        clip = clips()
        first, second = model.forward_with_maps(clip)[1].values()
        stages = model.forward_stages(clip)
        frames = stages[-1].shape[1]
        assert first.kept.shape[1] == second.kept.shape[1] == 4
        assert set(first.kept.unique().tolist()) == {0.0, 1.0}
        whole = first.kept.flatten(2)
        assert (whole.amin(2) == whole.amax(2)).all(), "frames are kept whole"
        assert (whole.amax(2).sum(1) == frames).all()
        # The best frames of the profile are those that are left.
        best = first.profiles["score"].topk(frames).indices
        assert (whole.amax(2).gather(1, best) == 1).all()
        windows = second.kept.sum((2, 3))
        assert ((windows > 0) == (whole.amax(2) > 0)).all(), (
            "windows lie in the frames that are left"
        )
        assert len(windows[windows > 0].unique()) == 1

    def test_windows_within_windows(self):
        """4 of 8 columns, then 2 of 4 of those at half the resolution: a quarter of the picture."""
        model = with_token_selection(backbone("swin"), selection({}, {0: 0.25, 1: 0.25}))
        first, second = model.forward_with_maps(clips())[1].values()
        assert first.kept.shape == (2, 4, 8, 8)
        assert (first.kept.sum((2, 3)) == 16).all()
        assert second.kept.shape == (2, 4, 4, 4)
        assert (second.kept.sum((2, 3)) == 1).all()
        coarse = nn.functional.max_pool2d(first.kept, 2)
        assert (second.kept <= coarse).all()


class TestRefusals:
    def test_places_that_do_not_exist(self):
        with pytest.raises(UsageError, match="before block 3"):
            with_token_selection(backbone("mvit"), selection({3: 0.5}))
        with pytest.raises(UsageError, match="before stage -1"):
            with_token_selection(backbone("swin"), selection({}, {-1: 0.5}))

    def test_other_backbones(self):
        with pytest.raises(UsageError, match="S3D"):
            with_token_selection(build_torchvision("s3d", 2), Selection())


MVIT_LADDER = [
    (0.875, 0.863, 56.2),
    (0.75, 0.863, 47.1),
    (0.625, 0.863, 38.3),
    (0.5, 0.7367, 26.9),
    (0.375, 0.6174, 18.4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("time", "space", "expected"), MVIT_LADDER)
def test_multiply_adds_of_mvit_are_those_of_the_released_configurations(time, space, expected):
    """Measured there without the layer norms, which our counter includes."""
    model = with_token_selection(video.mvit_v1_b(), selection({0: time}, {4: space}))
    flops = count_multiply_adds(model, torch.zeros(1, 3, 16, 224, 224))
    total = flops.total - flops.by_operator["layer_norm"]
    assert total / 1e9 == pytest.approx(expected, rel=0.005)


@pytest.mark.slow
def test_multiply_adds_of_swin_are_those_of_the_released_configuration():
    model = with_token_selection(video.swin3d_b(), selection({0: 0.375}))
    flops = count_multiply_adds(model, torch.zeros(1, 3, 32, 224, 224))
    total = flops.total - flops.by_operator["layer_norm"]
    assert total / 1e9 == pytest.approx(102.2, rel=0.005)


@pytest.mark.slow
def test_recommended_selection_halves_the_multiply_adds_of_ogreg():
    model = with_token_selection(build_ogreg("t", 400), selection({1: 0.5}, {2: 0.7367}))
    flops = count_multiply_adds(model, torch.zeros(1, 3, 32, 224, 224))
    assert flops.total / 1e9 == pytest.approx(33.3, rel=0.005)
