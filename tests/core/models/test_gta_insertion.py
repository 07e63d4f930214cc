"""Global temporal attention after stages of OG-ReG, and of blocks with channels first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.gta import GTAConfig
from ogreg_core.models.gta_insertion import insert_gta
from ogreg_core.models.ogreg import VARIANTS, build_ogreg
from ogreg_core.models.protocol import BlockMaps, VideoModel
from ogreg_core.models.registry import create_model
from ogreg_core.models.weights import initialise
from ogreg_core.training.memory import checkpoint_activations
from ogreg_core.training.optim import OptimSettings, parameter_groups
from tests.thin import one_block_a_stage

CLIP = (2, 3, 8, 64, 64)


def plain() -> nn.Module:
    torch.manual_seed(1)
    return build_ogreg("n", 7, strides=(4, 2, 1, 1)).eval()


def inserted(stages=(2, 3), moved: bool = True, **choices) -> nn.Module:
    model = plain()
    insert_gta(model, stages, frames=8, size=64, config=GTAConfig(regions=4, **choices))
    if moved:
        for module in modules(model):
            nn.init.constant_(module.norm.weight, 0.5)
    return model


def modules(model: nn.Module) -> list[nn.Module]:
    return [blocks[-1].gta for blocks in model.stage_blocks() if hasattr(blocks[-1], "gta")]


def test_model_stays_what_it_was_until_the_modules_have_learned():
    clip = torch.randn(CLIP)
    with torch.no_grad():
        before = plain()(clip)
        assert torch.equal(inserted(moved=False)(clip), before)
        assert (inserted()(clip) - before).abs().max() > 1e-3


def test_modules_fit_their_stage_and_run_after_its_last_block():
    model = plain()
    names = insert_gta(model, [3, 2], frames=8, size=64, config=GTAConfig(regions=4))
    assert names == ["stages.2.2.gta", "stages.1.0.gta"]
    assert model.stages[2][2].gta.qkv.in_features == 128
    assert model.stages[2][2].gta.pixel.frames == 4  # token frames
    gta = model.stages[2][2].gta
    nn.init.ones_(gta.norm.weight)
    clip = torch.randn(CLIP)
    with torch.no_grad():
        expected = gta(plain().forward_stages(clip)[2])
        torch.testing.assert_close(model.forward_stages(clip)[2], expected)


def test_starting_weights_still_fit():
    source, model = plain(), inserted()
    report = initialise(model, source.state_dict(), "x", classes=["a"], source_classes=["a"])
    assert not report.unexpected + report.mismatched
    assert report.missing
    assert all(".gta." in name for name in report.missing)


def test_protocol_knows_the_modules():
    model, clip = inserted(bias="frame"), torch.randn(CLIP)
    assert isinstance(model, VideoModel)
    with torch.no_grad():
        expected = model(clip)
    logits, maps = model.forward_with_maps(clip)
    torch.testing.assert_close(logits, expected)
    assert set(maps) == {*plain().forward_with_maps(clip)[1], "stage2.gta", "stage3.gta"}
    assert maps["stage3.gta"].glance.shape == (2, 4, 4, 4)
    exempt = model.no_weight_decay()
    assert {"stages.2.2.gta.pixel.matrix", "stages.2.2.gta.region.temporal.bias"} <= exempt
    assert "stages.2.2.norm1.weight" in exempt
    assert "stages.2.2.gta.qkv.weight" not in exempt
    groups = parameter_groups(model, OptimSettings(lr=1.0, weight_decay=0.1, layer_decay=0.5))
    grouped = [name for group in groups for name in group.parameters]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())


def test_a_second_insertion_keeps_the_first():
    model = inserted(stages=[2])
    insert_gta(model, [3], frames=8, size=64)
    maps = model.forward_with_maps(torch.randn(CLIP))[1]
    assert {"stage2.gta", "stage3.gta"} <= set(maps)
    assert "stages.1.0.gta.pixel.matrix" in model.no_weight_decay()


def test_copies_are_independent():
    model, clip = inserted(), torch.randn(CLIP)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(clip)
        torch.testing.assert_close(twin(clip), before)
        twin.stages[2][2].gta.norm.weight.fill_(-3)
        assert (twin(clip) - before).abs().max() > 1e-3
        torch.testing.assert_close(model(clip), before)
    maps = [m.forward_with_maps(clip)[1]["stage3.gta"].profiles["read"] for m in (model, twin)]
    assert torch.equal(*maps)


def test_gradients_are_the_same_when_recomputed_and_reach_the_modules():
    kept, saved = inserted(), inserted()
    checkpoint_activations(saved, [1, 2, 3, 4])
    clip = torch.randn(CLIP)
    for model in (kept, saved):
        model.train()
        model(clip).square().sum().backward()
    for (name, ours), theirs in zip(kept.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name
        if ".gta." in name:
            assert ours.grad.abs().max() > 0, name


def test_training_mode_is_kept():
    model = plain().train()
    before = copy.deepcopy(model.state_dict())
    insert_gta(model, [3], frames=8, size=64)
    assert model.training
    assert modules(model)[0].training
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
def test_compiles_as_one_graph(monkeypatch):
    one_block_a_stage(monkeypatch, VARIANTS)
    model, clip = inserted(), torch.randn(CLIP)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(clip), inserted()(clip), atol=1e-5, rtol=1e-4)


class Toy(nn.Module):
    """One stage of one convolution, whose block answers in the given form."""

    num_classes = 2

    def __init__(self, form: str) -> None:
        super().__init__()
        self.block = ToyBlock(form)

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        out = self.block(clip)
        return [(out[0] if isinstance(out, tuple) else out).movedim(1, -1).unflatten(1, (2, -1))]

    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        return self.forward_stages(clip)[0], {}

    def no_weight_decay(self) -> set[str]:
        return set()

    def stage_blocks(self) -> list[list[nn.Module]]:
        return [[self.block]]


class ToyBlock(nn.Conv3d):
    def __init__(self, form: str) -> None:
        super().__init__(3, 16, 1)
        self.form = form

    def forward(self, clip: Tensor):
        x = super().forward(clip)
        return {"volume": x, "tokens": x.flatten(2), "pair": (x, 1)}[self.form]


class ToyVolumes(Toy):
    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        return [self.block(clip).movedim(1, -1)]


def test_channels_first_is_noticed():
    model = ToyVolumes("volume")
    insert_gta(model, [1], frames=2, size=6)
    assert model.block.gta.layout == "first"
    nn.init.ones_(model.block.gta.norm.weight)
    clip = torch.randn(1, 3, 2, 6, 6)
    x = nn.Conv3d.forward(model.block, clip)
    torch.testing.assert_close(model.forward_stages(clip)[0], model.block.gta(x).movedim(1, -1))


def test_blocks_that_give_something_else_are_refused_and_left_alone():
    model = Toy("tokens")
    with pytest.raises(UsageError, match="cannot follow stage 1") as caught:
        insert_gta(model, [1], frames=2, size=6)
    assert "[1, 16, 72]" in caught.value.why
    assert not hasattr(model.block, "gta")
    assert "forward" not in vars(model.block)


def test_stages_that_are_not_there_or_taken_are_refused():
    for number in (0, 5):
        with pytest.raises(UsageError, match=f"no stage {number}") as caught:
            inserted(stages=[number])
        assert "1 to 4" in caught.value.why
    with pytest.raises(UsageError, match="already"):
        insert_gta(inserted(stages=[3]), [3], frames=8, size=64)


def test_recipes_and_checkpoints_name_it():
    chosen = {"stages": [1, 3], "options": {"regions": 0, "heads": 4}}
    torch.manual_seed(0)
    model = create_model("ogreg-n", 5, frames=8, size=64, gta=chosen).eval()
    torch.manual_seed(0)
    bare = create_model("ogreg-n", 5).eval()
    new = model.state_dict().keys() - bare.state_dict().keys()
    assert {name.split(".gta.")[0] for name in new} == {"stages.0.0", "stages.2.2"}
    clip = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        # Until the modules have learnt, they change nothing.
        assert torch.equal(model(clip), bare(clip))
        with pytest.raises(UsageError, match="frames"):
            model(clip[:, :, :4])
