"""Metrics against torchmetrics and plain loops; scores against the definition."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ogreg_core.data.loader import Unreadable, ViewBatch, test_loader
from ogreg_core.distributed import SINGLE, World
from ogreg_core.errors import DataError
from ogreg_core.evaluation import (
    autocast,
    confusion_matrix,
    metrics_of,
    ranks,
    resolve_precision,
    score_dataset,
    score_views,
)
from ogreg_core.progress import ignore_progress


@given(classes=st.integers(2, 12), count=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=40)
def test_metrics_equal_a_plain_loop(classes, count, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, classes, generator=generator).softmax(1)
    labels = torch.randint(0, classes, (count,), generator=generator)
    found = metrics_of(scores, labels)
    by_class: dict[int, list[bool]] = {}
    top1 = top5 = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        order = sorted(range(classes), key=lambda c: -row[c])
        top1 += order[0] == label
        top5 += label in order[:5]
        by_class.setdefault(label, []).append(order[0] == label)
    assert found.top1 == pytest.approx(100 * top1 / count, abs=1e-3)
    assert found.top5 == pytest.approx(100 * top5 / count, abs=1e-3)
    means = {label: 100 * sum(hits) / len(hits) for label, hits in by_class.items()}
    assert found.mean_class == pytest.approx(sum(means.values()) / len(means), abs=1e-3)
    for label in range(classes):
        assert (
            found.per_class[label] == pytest.approx(means[label])
            if label in means
            else (found.per_class[label] is None)
        )


def test_metrics_equal_torchmetrics_where_every_class_occurs():
    from torchmetrics.functional.classification import multiclass_accuracy

    torch.manual_seed(0)
    scores, labels = torch.rand(300, 9).softmax(1), torch.arange(300) % 9
    found = metrics_of(scores, labels)
    for name, options in (
        ("top1", {"average": "micro"}),
        ("top5", {"average": "micro", "top_k": 5}),
        ("mean_class", {"average": "macro"}),
    ):
        expected = 100 * multiclass_accuracy(scores, labels, 9, **options).item()
        assert found.figures()[name] == pytest.approx(expected, abs=1e-3)
    assert found.loss == pytest.approx(
        nn.functional.nll_loss(scores.log(), labels).item(), rel=1e-5
    )


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, clip):
        return self.head(clip.mean((2, 3, 4)))


def test_scores_are_the_mean_softmax_over_views():
    model = Linear().eval()
    views = torch.randint(0, 256, (7, 6, 3, 2, 8, 8), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    found = score_views(model, views, mean, std)
    for video in range(7):
        parts = []
        for view in range(6):
            pixels = views[video, view].float() / 255
            for channel in range(3):
                pixels[channel] = (pixels[channel] - mean[channel]) / std[channel]
            parts.append(model(pixels[None]).softmax(-1)[0])
        torch.testing.assert_close(found[video], torch.stack(parts).mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(7))


def test_a_video_without_a_score_counts_as_wrong():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    found = metrics_of(scores, torch.tensor([0, 1]), missed=[0, 2])
    assert (found.top1, found.top5, found.videos, found.unreadable) == (50.0, 50.0, 4, 2)
    assert found.per_class == [50.0, 100.0, 0.0]
    assert found.per_class_videos == [2, 1, 1]
    assert found.mean_class == pytest.approx(50.0)
    assert found.loss == pytest.approx(-(math.log(0.9) + math.log(0.8)) / 2)


def test_calibration_and_intervals():
    from torchmetrics.functional.classification import multiclass_calibration_error

    torch.manual_seed(0)
    scores, labels = (2 * torch.randn(300, 9)).softmax(1), torch.arange(300) % 9
    found = metrics_of(scores, labels)
    expected = 100 * multiclass_calibration_error(scores, labels, 9, n_bins=15).item()
    assert found.ece == pytest.approx(expected, abs=1e-3)
    assert found.figures()["ece"] == found.ece
    low, high = found.interval(found.top5)
    assert low < found.top5 < high
    # Videos that could not be read are trials too.
    missed = metrics_of(scores, labels, missed=[0] * 300)
    assert missed.interval(missed.top1)[1] < found.interval(found.top1)[0] + found.top1 / 2


def test_confusion_equals_torchmetrics():
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    torch.manual_seed(0)
    scores, labels = torch.rand(200, 7), torch.randint(0, 6, (200,))
    found = confusion_matrix(scores, labels)
    assert torch.equal(found, multiclass_confusion_matrix(scores, labels, 7))
    scores[labels == 2] = torch.nan
    found = confusion_matrix(scores, labels)
    assert found[2].sum() == 0
    assert found.sum() == (labels != 2).sum()


def test_ranks_count_ties_in_class_order():
    scores = torch.tensor([[0.3, 0.4, 0.3], [0.5, 0.5, 0.0], [1 / 3] * 3])
    for label, expected in enumerate(([2, 1, 1], [1, 2, 2], [3, 3, 3])):
        assert ranks(scores, torch.full((3,), label)).tolist() == expected
    assert torch.equal(ranks(scores, scores.argmax(1)), torch.ones(3, dtype=torch.int64))


def test_scores_that_are_not_numbers_are_never_right():
    scores = torch.tensor([[0.9, 0.1], [math.nan, math.nan]])
    found = metrics_of(scores, torch.tensor([0, 0]))
    assert (found.top1, found.top5) == (50.0, 50.0)
    assert math.isnan(found.loss)
    assert math.isnan(found.ece)


@dataclass
class Rows:
    """Videos of random views; those in ``broken`` cannot be read."""

    count: int
    broken: tuple[int, ...] = ()

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            nothing = torch.empty(0, dtype=torch.int64)
            failed = Unreadable(index, f"{index}.mp4", "broken")
            return ViewBatch(torch.empty(0, dtype=torch.uint8), nothing, nothing, (failed,))
        generator = torch.Generator().manual_seed(index)
        shape = (1, 2, 3, 2, 8, 8)
        views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return ViewBatch(views, torch.tensor([index % 5]), torch.tensor([index]), ())


@dataclass(frozen=True)
class Thread(World):
    """One of several threads that exchange what they hold as processes do."""

    meeting: threading.Barrier | None = None
    table: list | None = None

    def gather(self, item):
        self.table[self.rank] = item
        self.meeting.wait(20)
        return list(self.table)


def score(rows, model, world=SINGLE, on_progress=ignore_progress):
    loader = test_loader(rows, 2, 0, world)
    return score_dataset(
        model, loader, (0.5,) * 3, (0.2,) * 3, on_progress=on_progress, world=world
    )


def score_in_threads(rows, model, size):
    meeting, table = threading.Barrier(size), [None] * size
    worlds = [Thread(rank, size, rank, meeting=meeting, table=table) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(score, rows, model, world) for world in worlds]
        return [future.result(30) for future in futures]


@pytest.mark.parametrize(
    ("count", "broken", "size"),
    [(7, (), 2), (7, (3,), 2), (3, (), 4), (1, (), 3), (8, (0, 1, 5), 3), (4, (0, 2), 2)],
)
def test_shares_of_several_processes_are_the_whole(count, broken, size):
    """Each row once, in manifest order, on every process, whichever could not be read."""
    model = Linear().eval()
    rows = Rows(count, broken)
    alone = score(rows, model)
    assert alone.indices.tolist() == [i for i in range(count) if i not in broken]
    for found in score_in_threads(rows, model, size):
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-6, rtol=0)
        assert torch.equal(found.indices, alone.indices)
        assert torch.equal(found.labels, alone.labels)
        assert found.unreadable == alone.unreadable
        assert [video.index for video in found.unreadable] == list(broken)


def test_nothing_readable_is_an_error_on_every_process():
    rows, model = Rows(3, (0, 1, 2)), Linear()
    with pytest.raises(DataError, match="not one video"):
        score(rows, model)
    with pytest.raises(DataError, match="not one video"):
        score_in_threads(rows, model, 2)


def test_shares_that_overlap_are_found_out():
    rows, model = Rows(4), Linear()
    world = Thread(0, 2, 0, meeting=threading.Barrier(1), table=[None, [score(rows, model)]])
    with pytest.raises(AssertionError, match="each video once"):
        score(rows, model, world)


def test_progress_counts_the_whole_and_mode_is_restored():
    events = []
    model = Linear().train()
    score(Rows(5), model, on_progress=events.append)
    assert [(event.done, event.total) for event in events] == [(2, 5), (4, 5), (5, 5)]
    assert model.training
    events.clear()
    world = Thread(0, 2, 0, meeting=threading.Barrier(1), table=[None, [score(Rows(5), model)]])
    with pytest.raises(AssertionError):
        score(Rows(5), model, world, events.append)
    assert [(event.done, event.total) for event in events] == [(4, 5), (5, 5)]


def test_tf32_is_fp32_with_another_matmul_and_needs_cuda():
    assert resolve_precision("tf32", torch.device("cpu")) == "fp32"
    assert resolve_precision("tf32", torch.device("cuda")) == "tf32"
    seen = []

    class Watched(Linear):
        def forward(self, clip):
            seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
            return super().forward(clip)

    views = torch.zeros(1, 1, 3, 2, 8, 8, dtype=torch.uint8)
    before = torch.get_float32_matmul_precision()
    for precision in ("tf32", "fp32", "bf16"):
        score_views(Watched(), views, (0.5,) * 3, (0.2,) * 3, precision)
    assert seen == [("high", False), (before, False), (before, True)]
    assert torch.get_float32_matmul_precision() == before
    with autocast(torch.device("cpu"), "tf32"):
        assert not torch.is_autocast_enabled("cpu")
