"""Rollout and queries against the dense matrices that the code never makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from ogreg_core.errors import UsageError
from ogreg_core.gaze import glance as glance_module
from ogreg_core.gaze.geometry import Reduction, lattices_of, to_pixels
from ogreg_core.gaze.glance import Place, glance_of
from ogreg_core.models import attention_maps
from ogreg_core.models.attention_maps import TokenAttention, overlap, rollout
from ogreg_core.models.layers import attention_weights, captured_inputs
from ogreg_core.models.ogreg import OGReG, OGReGConfig, Stage
from ogreg_core.models.registry import create_model
from ogreg_core.models.xvit import XViT, XViTConfig

CLIP = (4, 64, 64)


def clip() -> torch.Tensor:
    return torch.randn(1, 3, *CLIP, generator=torch.Generator().manual_seed(1))


def sharpened(model: nn.Module) -> nn.Module:
    """Attention that is far from even: larger queries and keys."""
    for name, parameter in model.named_parameters():
        if ".qkv.weight" in name:
            parameter.data *= 40
    return model.eval()


@pytest.fixture(scope="module")
def ogreg() -> OGReG:
    """Grids of 4x4, 4x4, 2x2 and 2x2 coarse tokens in two token frames."""
    torch.manual_seed(0)
    stages = (Stage(16, 1, 2, 4), Stage(32, 2, 2, 2), Stage(64, 1, 2, 2), Stage(64, 1, 2, 1))
    stages = (stages[0], stages[1], stages[2], replace(stages[3], dim=128))
    return sharpened(OGReG(OGReGConfig(stages), 3))


def dense(model: OGReG, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """Mean attention matrices ``[N, N]`` by block, and their grids."""
    blocks = model.blocks()
    with captured_inputs({name: block.glance for name, block in blocks.items()}) as inputs:
        model(x)
    found = {}
    for name, y in inputs.items():
        coarse = blocks[name].glance.coarse(y)
        qkv = blocks[name].glance.qkv(coarse.flatten(1, 3))
        weights = attention_weights(qkv, blocks[name].glance.heads)[0].mean(0)
        found[name] = (weights.double(), tuple(coarse.shape[1:4]))
    return found


def between(late: tuple[int, ...], early: tuple[int, ...]) -> torch.Tensor:
    """By counting on a fine grid how much of each late token's area belongs to each early one."""
    fine = [torch.arange(16) * count // 16 for count in (*late[1:], *early[1:])]
    size_late, size_early = torch.tensor(late).prod(), torch.tensor(early).prod()
    shares = torch.zeros(int(size_late), int(size_early), dtype=torch.double)
    for t in range(late[0]):
        for y in range(16):
            for x in range(16):
                i = (t * late[1] + fine[0][y]) * late[2] + fine[1][x]
                j = (t * early[1] + fine[2][y]) * early[2] + fine[3][x]
                shares[i, j] += 1
    return shares / shares.sum(1, keepdim=True)


def dense_rollout(model: OGReG, names: list[str], x: torch.Tensor) -> torch.Tensor:
    """The matrix ``[N_last, N_first]`` of Abnar and Zuidema, layer by layer from the input on."""
    joint, before = None, None
    for name, (weights, grid) in dense(model, x).items():
        if name not in names:
            continue
        layer = (weights + torch.eye(len(weights), dtype=torch.double)) / 2
        joint = layer if joint is None else layer @ between(grid, before) @ joint
        before = grid
    return joint


def drawn(mass: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    volume = mass.reshape(grid) / mass.sum() * mass.numel()
    return to_pixels(volume, lattices_of(grid, CLIP, Reduction(2, 4)))


@pytest.mark.parametrize("names", [["stage1.block1"], ["stage2.block1", "stage2.block2"], None])
def test_rollout_is_the_product_of_all_matrices(ogreg, names):
    names = names or list(ogreg.blocks())
    joint = dense_rollout(ogreg, names, clip())
    grid = dense(ogreg, clip())[names[0]][1]
    found = glance_of(ogreg, clip(), "rollout", names, Reduction(2, 4))
    torch.testing.assert_close(found, drawn(joint.mean(0).float(), grid), atol=1e-4, rtol=1e-4)
    assert found.std() > 0.01
    # From one token of the last grid: frame 1, right of the middle, at the bottom.
    place = Place(40.0, 60.0, 2.6)
    late = dense(ogreg, clip())[names[-1]][1]
    token = (1 * late[1] + late[1] - 1) * late[2] + int(40 / 64 * late[2])
    found = glance_of(ogreg, clip(), "rollout", names, Reduction(2, 4), place)
    torch.testing.assert_close(found, drawn(joint[token].float(), grid), atol=1e-4, rtol=1e-4)


def test_query_is_the_mean_of_the_rows_of_its_tokens(ogreg):
    place = Place(5.0, 33.5, 0.2)
    names = ["stage1.block1", "stage3.block1"]
    pictures = []
    for name in names:
        weights, grid = dense(ogreg, clip())[name]
        token = (0 * grid[1] + grid[1] // 2) * grid[2]
        pictures.append(drawn(weights[token].float(), grid))
    found = glance_of(ogreg, clip(), "query", names, Reduction(2, 4), place)
    torch.testing.assert_close(found, torch.stack(pictures).mean(0), atol=1e-4, rtol=1e-4)


def test_uniform_queries_are_the_attention_received(ogreg):
    _, maps = ogreg.forward_with_maps(clip())
    for name, (weights, grid) in dense(ogreg, clip()).items():
        received = maps[name].glance[0]
        torch.testing.assert_close(received.flatten(), weights.mean(0).float())
        assert tuple(received.shape) == grid


def test_pieces_of_queries_change_nothing(ogreg, monkeypatch):
    names = list(ogreg.blocks())
    whole = glance_of(ogreg, clip(), "rollout", names, Reduction(2, 4))
    monkeypatch.setattr(attention_maps, "_WEIGHTS_BYTES", 1)
    torch.testing.assert_close(glance_of(ogreg, clip(), "rollout", names, Reduction(2, 4)), whole)


def test_memory_grows_with_the_tokens_and_not_with_their_square(monkeypatch):
    monkeypatch.setattr(attention_maps, "_WEIGHTS_BYTES", 2**17)
    edges = tuple(torch.linspace(0, 1, count + 1) for count in (4, 16, 16))
    attention = TokenAttention(torch.randn(1, 2, 1024, 8), torch.randn(1, 2, 1024, 8), edges)
    largest = 0
    weights = TokenAttention.weights

    def watched(self, rows):
        nonlocal largest
        found = weights(self, rows)
        largest = max(largest, found.numel())
        return found

    monkeypatch.setattr(TokenAttention, "weights", watched)
    mass = torch.full((1, 1024), 1 / 1024)
    assert float(rollout([attention], mass).sum()) == pytest.approx(1, abs=1e-4)
    assert 0 < largest <= 1024 * 8


def test_cells_share_their_mass_by_area():
    fine, coarse = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0.0, 0.4, 1.0])
    expected = torch.tensor([[0.625, 0.375, 0.0], [0.0, 1 / 6, 5 / 6]])
    torch.testing.assert_close(overlap(coarse, fine), expected)


@pytest.fixture(scope="module")
def xvit() -> XViT:
    torch.manual_seed(0)
    config = XViTConfig(dim=32, depth=4, heads=2, patch=16, table_size=64, segment=4, summary="odd")
    return sharpened(XViT(config, 3))


def dense_xvit(model: XViT, x: torch.Tensor) -> list[torch.Tensor]:
    """Mean attention matrices ``[T, N, N]``; what goes to summary tokens is shared out."""
    blocks = list(model.blocks)
    with captured_inputs({str(i): block.attn for i, block in enumerate(blocks)}) as inputs:
        model(x)
    found = []
    for number, y in inputs.items():
        q, k, _ = blocks[int(number)].attn.project(y)
        logits = torch.einsum("tmqd,tmkd->tmqk", q, k) / q.shape[-1] ** 0.5
        weights = logits.softmax(-1).mean(1)[:, :, : y.shape[2]]
        found.append(weights / weights.sum(-1, keepdim=True))
    return found


def test_frames_of_xvit_are_rolled_out_from_their_class_tokens(xvit):
    joint = None
    for weights in dense_xvit(xvit, clip()):
        layer = (weights + torch.eye(17)) / 2
        joint = layer if joint is None else layer @ joint
    grid = (4, 4, 4)
    lattices = lattices_of(grid, CLIP, Reduction())
    names = [f"stage{number}.block1" for number in (1, 2, 3, 4)]
    mass = joint[:, 0, 1:].reshape(grid)
    expected = to_pixels(mass / mass.sum() * 64, lattices)
    found = glance_of(xvit, clip(), "rollout", names, Reduction())
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)
    row = dense_xvit(xvit, clip())[1][2, 1 + 3 * 4 + 1, 1:]
    mass = torch.zeros(grid)
    mass[2] = (row / row.sum() * 64).reshape(4, 4)
    place = Place(24.0, 63.0, 2.5)
    found = glance_of(xvit, clip(), "query", ["stage2.block1"], Reduction(), place)
    torch.testing.assert_close(found, to_pixels(mass.detach(), lattices), atol=1e-4, rtol=1e-4)


def test_refusals(ogreg, monkeypatch):
    with pytest.raises(UsageError, match="OG-ReG without token selection"):
        glance_of(create_model("r2plus1d-18", 2), clip(), "rollout", ["stage1"], Reduction())
    with pytest.raises(UsageError, match="needs blocks with attention"):
        glance_of(ogreg, clip(), "rollout", ["stage9"], Reduction(2, 4))
    monkeypatch.setattr(glance_module, "MOST_TOKENS", 31)
    with pytest.raises(UsageError, match="among 32 tokens") as caught:
        glance_of(ogreg, clip(), "rollout", ["stage1.block1"], Reduction(2, 4))
    assert caught.value.fix == "--glance received"
