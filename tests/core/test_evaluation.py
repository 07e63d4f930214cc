"""Metrics against torchmetrics and plain loops; scores against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ogreg_core.evaluation import metrics_of, score_views


@given(classes=st.integers(2, 12), count=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
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
