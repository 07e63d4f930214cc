from __future__ import annotations

import pytest
import torch
from torch import nn

from ogreg_core.profiling.counting import count_multiply_adds, count_parameters, observe
from ogreg_core.profiling.modules import OWN, module_costs
from ogreg_core.profiling.subject import Subject


def rows_of(model, clip, depth):
    flops, seen = count_multiply_adds(model, clip), observe(model, clip)
    whole = (count_parameters(model), flops.total, seen.activations[""])
    return module_costs(model, flops, seen, depth), whole


def figures(row):
    return row.params, row.multiply_adds, row.activations


def sums(rows):
    return tuple(map(sum, zip(*(figures(row) for row in rows), strict=True)))


@pytest.mark.parametrize(
    ("name", "frames", "options"),
    [
        ("ogreg-n", 4, {}),
        ("ogreg-n", 4, {"token_selection": {"time": [{"before": 1, "ratio": 0.5}]}}),
        ("swin3d-t", 2, {}),
        ("gta-r50-8f", 8, {}),
    ],
)
def test_every_level_adds_up(name, frames, options):
    subject = Subject.fresh(name, options, 10, frames, 32)
    rows, whole = rows_of(subject.build(), subject.clip(), 9)
    assert sums([row for row in rows if row.depth == 1]) == whole
    parents = 0
    for number, row in enumerate(rows):
        inside = []
        for other in rows[number + 1 :]:
            if other.depth <= row.depth:
                break
            inside += [other] if other.depth == row.depth + 1 else []
        if inside:
            parents += 1
            assert sums(inside) == figures(row), row.name
            assert all(other.name.startswith(f"{row.name}.") for other in inside)
    assert parents > 10


def test_stages_of_ogreg_in_the_order_of_the_pass():
    subject = Subject.fresh("ogreg-n", {}, 10, 4, 32)
    rows, _ = rows_of(subject.build(), subject.clip(), 1)
    names = [row.name for row in rows]
    assert names == [
        *("stem", "stages.0", "merges.0", "stages.1", "merges.1", "stages.2", "merges.2"),
        *("stages.3", "norm", "head"),
    ]


def test_stages_are_found_inside_a_container():
    subject = Subject.fresh("swin3d-t", {}, 10, 2, 32)
    rows, _ = rows_of(subject.build(), subject.clip(), 1)
    assert [row.name for row in rows if "features" in row.name] == [
        f"features.{n}" for n in range(7)
    ]


def test_fused_attention_stands_where_it_runs():
    subject = Subject.fresh("ogreg-n", {}, 10, 4, 64)
    model, clip = subject.build(), subject.clip()
    rows, _ = rows_of(model, clip, 9)
    own = [row for row in rows if row.name.endswith(f"glance.{OWN}")]
    assert len(own) == 6
    attention = count_multiply_adds(model, clip).attention
    # Beside its attention, a Glance interpolates, and applies its position table by itself.
    last = next(row for row in own if row.name.startswith("stages.3"))
    tokens = 2 * 2 * 2
    assert last.multiply_adds >= 2 * tokens * tokens * 256
    assert sum(row.multiply_adds for row in own) > attention


class Shared(nn.Module):
    """One layer twice, a parameter of its own, and a layer whose weight alone is used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(3))
        self.uncalled = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        x = self.first(self.first(x))
        return nn.functional.linear(x, self.uncalled.weight)


def test_what_is_done_beside_the_parts_has_its_row():
    rows, whole = rows_of(Shared(), torch.zeros(5, 4), 2)
    found = {row.name: figures(row) for row in rows}
    assert found == {
        "first": (20, 2 * 5 * 16, 2 * 5 * 4),
        "first.0": (20, 2 * 5 * 16, 2 * 5 * 4),
        OWN: (3 + 8, 5 * 8, 5 * 2),
    }
    assert whole == (31, 2 * 80 + 40, 50)
