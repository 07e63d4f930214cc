from __future__ import annotations

import pytest
import torch

from ogreg_core.profiling.clip_work import CLOSED_BELOW, clip_work
from ogreg_core.profiling.subject import Subject


def model_of(frames=6, name="ogreg-n", **options):
    return Subject.fresh(name, options, 5, frames, 32).build()


def by_hand(gaze, y):
    """m of every channel at every position between two frames, and the taps between them."""
    _, frames, height, width, channels = y.shape
    a, b = gaze.sharpness.double(), gaze.offset.double()
    openings, taps = [], 0
    for t in range(frames - 1):
        for i in range(height):
            for j in range(width):
                before, after = y[0, t, i, j].double(), y[0, t + 1, i, j].double()
                d = 1 - torch.dot(before, after) / (before.norm() * after.norm())
                m = (torch.sigmoid(a * d + b) - torch.sigmoid(b)) / (1 - torch.sigmoid(b))
                openings.append(m)
                # Nine taps of the frame before and nine of the one after.
                taps += 2 * 9 * channels
    return torch.stack(openings), taps


@torch.no_grad()
def test_openings_and_what_closed_ones_would_save():
    model = model_of()
    last = model.stages[3][0].gaze
    # Around the threshold, so that both sides of it occur, and channels differ.
    last.sharpness.copy_(torch.linspace(0.1, 0.4, 256))
    seen = []
    last.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
    clip = torch.randn(1, 3, 6, 64, 64)
    found = clip_work(model, clip)
    assert [gaze.name for gaze in found.gazes] == [
        *("stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.2.2", "stages.3.0"),
    ]
    openings, taps = by_hand(last, seen[0])
    closed = int((openings.amax(dim=1) <= CLOSED_BELOW).sum())
    assert 0 < closed < len(openings)
    work = found.gazes[-1]
    assert work.mean_modulation == pytest.approx(float(openings.mean()), rel=1e-4)
    assert work.closed == pytest.approx(closed / len(openings))
    assert work.taps.dense_multiply_adds == taps
    assert work.closed_multiply_adds == pytest.approx(taps * closed / len(openings))
    document = found.document()
    assert document["skippable_gmacs"] == pytest.approx(found.closed_multiply_adds / 1e9)
    assert document["selections"] == []


def test_a_still_clip_closes_everything_and_a_lively_one_does_not():
    model = model_of()
    still = clip_work(model, torch.randn(1, 3, 1, 32, 32).expand(1, 3, 6, 32, 32))
    assert all(gaze.closed == 1 and gaze.mean_modulation < 1e-3 for gaze in still.gazes)
    lively = clip_work(model, torch.randn(1, 3, 6, 32, 32))
    assert lively.gazes[0].closed < 0.5


def test_one_token_frame_has_no_temporal_taps():
    found = clip_work(model_of(2), torch.randn(1, 3, 2, 32, 32))
    assert {gaze.taps.dense_multiply_adds for gaze in found.gazes} == {0}


def test_what_token_selection_keeps():
    selection = {
        "time": [{"before": 1, "ratio": 0.5}],
        "space": [{"before": 2, "ratio": 0.25}],
    }
    model = model_of(8, token_selection=selection)
    found = clip_work(model, torch.randn(1, 3, 8, 64, 64))
    # Two of four token frames; then one token of the four in each.
    assert found.kept == {"time1": pytest.approx(0.5), "space2": pytest.approx(0.125)}
    assert len(found.gazes) == 6
    assert [row["name"] for row in found.document()["selections"]] == ["time1", "space2"]


@pytest.mark.parametrize("options", [{"gaze": "2d"}, {"gaze": "3d"}])
def test_what_does_not_depend_on_the_clip_says_so(options):
    found = clip_work(model_of(**options), torch.randn(1, 3, 6, 32, 32))
    assert found.gazes == ()
    assert found.document()["data_dependent"] is False
    # One that listens to the whole frame does.
    found = clip_work(model_of(similarity="frame"), torch.randn(1, 3, 6, 32, 32))
    assert found.document()["data_dependent"] is True
