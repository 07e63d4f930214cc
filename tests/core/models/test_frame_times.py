"""Token times, and a network that asks for them beside one that counts frames."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.frame_times import REFERENCE_SECONDS, Clock, given_times, token_coordinates
from ogreg_core.models.ogreg import VARIANTS
from ogreg_core.models.protocol import logits_of, takes_times
from ogreg_core.models.registry import create_model
from ogreg_core.training.memory import checkpoint_activations
from tests.thin import one_block_a_stage

FRAMES = 8
AT_REFERENCE = torch.arange(FRAMES)[None] * (REFERENCE_SECONDS / 2)
SELECTING = {"time": [{"before": 0, "ratio": 0.5}]}


def network(position: str, **more: object) -> nn.Module:
    """Attention that is sharp enough to feel where tokens lie."""
    torch.manual_seed(0)
    model = create_model(
        "ogreg-n-ablation", 5, position=position, strides=[2, 1, 1, 1], **more
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qkv.weight" in name:
                parameter.mul_(20)
    return model


@pytest.fixture(scope="module")
def counting() -> nn.Module:
    return network("rotary")


@pytest.fixture(scope="module")
def timing() -> nn.Module:
    return network("rotary-seconds")


@pytest.fixture
def clip() -> Tensor:
    return torch.randn(1, 3, FRAMES, 32, 32)


class TestTokenCoordinates:
    def test_are_token_numbers_at_the_reference_rate(self):
        assert torch.equal(token_coordinates(AT_REFERENCE + 3), torch.arange(4.0)[None])

    def test_are_means_of_two_frames(self):
        found = token_coordinates(torch.tensor([[0.0, 1.0, 2.0, 4.0, 10.0]]))
        # Of the fifth frame the stem makes a token with itself.
        seconds = torch.tensor([[0.5, 3.0, 10.0]]) - 0.5
        torch.testing.assert_close(found, seconds / REFERENCE_SECONDS)


class TestRotarySeconds:
    def test_equals_frame_numbers_at_the_reference_rate(self, counting, timing, clip):
        assert counting.state_dict().keys() == timing.state_dict().keys()
        with torch.no_grad():
            expected = counting(clip)
            assert torch.equal(timing(clip, AT_REFERENCE), expected)
            # Unknown times: the reference rate, as for profiles of random numbers.
            assert torch.equal(timing(clip), expected)
            assert torch.equal(timing(clip[:, :, :5]), counting(clip[:, :, :5]))

    def test_minds_only_differences_of_times(self, timing, clip):
        uneven = torch.tensor([[0.0, 0.1, 0.15, 0.4, 0.5, 0.9, 1.0, 1.2]])
        with torch.no_grad():
            expected = timing(clip, uneven)
            torch.testing.assert_close(timing(clip, uneven + 7), expected, atol=1e-4, rtol=0)
            assert (expected - timing(clip, AT_REFERENCE)).abs().max() > 1e-2

    def test_each_clip_has_its_own_times(self, timing, clip):
        both = torch.cat([AT_REFERENCE, 2 * AT_REFERENCE])
        with torch.no_grad():
            apart = torch.cat([timing(clip, times[None]) for times in both])
            together = timing(clip.expand(2, -1, -1, -1, -1), both)
        torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
        assert (apart[0] - apart[1]).abs().max() > 1e-2

    def test_shifted_tokens_attend_alike(self, timing):
        """The product of a query and a key depends on how far apart in time they are, not on when."""
        glance = timing.stage_blocks()[0][0].glance
        y = torch.randn(1, 1, 4, 4, 32).expand(-1, 3, -1, -1, -1)
        weights = []
        for seconds in ([0.0, 0.4, 0.5], [0.0, 0.1, 0.5]):
            glance.clock.coordinates = torch.tensor([seconds]) / REFERENCE_SECONDS
            queries, keys, _ = glance.project(glance.coarse(y)).chunk(3, dim=-1)
            tokens = [x.unflatten(1, (3, -1))[:, :, 0] for x in (queries, keys)]
            weights.append(torch.einsum("bqc,bkc->bqk", *tokens)[0])
        # The same picture 0.4 and 0.1 s apart, from earlier to later in one and the other order.
        torch.testing.assert_close(weights[0][0, 1], weights[1][1, 2], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(weights[0][1, 2], weights[1][0, 1], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(weights[0][0, 2], weights[1][0, 2])
        assert (weights[0][0, 1] - weights[0][1, 2]).abs() > 1e-2

    def test_maps_are_of_the_given_times(self, timing, clip):
        slow = 3 * AT_REFERENCE
        with given_times(timing, slow):
            logits, maps = timing.forward_with_maps(clip)
        with torch.no_grad():
            assert torch.equal(logits, timing(clip, slow))
        usual = timing.forward_with_maps(clip)[1]
        name = "stage3.block1"
        assert (maps[name].glance - usual[name].glance).abs().max() > 1e-5

    def test_recomputed_activations_give_the_same_gradients(self, clip):
        plain, frugal = network("rotary-seconds"), network("rotary-seconds")
        checkpoint_activations(frugal, (1, 2))
        for model in (plain, frugal):
            model(clip, 2 * AT_REFERENCE).square().sum().backward()
        for ours, expected in zip(frugal.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, expected.grad)

    def test_compiled_it_gives_the_same(self, clip, monkeypatch):
        """In one graph; of a block per stage, as following the operators takes time."""
        one_block_a_stage(monkeypatch, VARIANTS)
        plain = network("rotary-seconds")
        compiled = copy.deepcopy(plain)
        compiled.compile(dynamic=False, backend="eager", fullgraph=True)
        with torch.no_grad():
            for times in (AT_REFERENCE, 2 * AT_REFERENCE):
                assert torch.equal(compiled(clip, times), plain(clip, times))

    def test_times_of_other_clips_are_refused(self, timing, clip):
        with pytest.raises(ValueError, match=r"\(1, 6\) of 1 clips of 8 frames"):
            timing(clip, AT_REFERENCE[:, :6])

    def test_token_selection_is_refused(self, clip):
        model = network("rotary-seconds", token_selection=SELECTING)
        with pytest.raises(UsageError, match="needs all frames"):
            model(clip)

    def test_copies_forget_the_times(self, timing, clip):
        timing(clip, AT_REFERENCE)
        clock = copy.deepcopy(timing).clock
        assert (clock.given, clock.coordinates) == (None, None)
        assert timing.clock.coordinates is not None


class TestLogitsOf:
    def test_models_that_take_no_times_get_one_argument(self, clip):
        got = []

        class Plain(nn.Module):
            def forward(self, *arguments: Tensor) -> Tensor:
                got.append(len(arguments))
                return arguments[0].mean(dim=(2, 3, 4))

        logits_of(Plain(), clip, AT_REFERENCE)
        assert got == [1]
        with given_times(Plain(), AT_REFERENCE):
            pass

    @pytest.mark.parametrize("position", ["conv", "rotary"])
    def test_the_other_encodings_take_none(self, position):
        with torch.device("meta"):
            assert not takes_times(create_model("ogreg-n-ablation", 5, position=position))

    def test_a_wrapper_does_not_hide_that_times_are_taken(self, timing, clip):
        class Wrapper(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, *arguments: Tensor) -> Tensor:
                return self.module(*arguments)

        with torch.no_grad():
            expected = timing(clip, 2 * AT_REFERENCE)
            found = logits_of(Wrapper(timing), clip, 2 * AT_REFERENCE, asked=timing)
        assert torch.equal(found, expected)


def test_a_clock_that_has_seen_nothing_refuses():
    with pytest.raises(UsageError, match="needs all frames"):
        Clock().now(torch.zeros(1, 4, 2, 2, 8))
