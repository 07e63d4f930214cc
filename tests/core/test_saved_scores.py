"""Scores survive their file; comparison and fusion equal plain loops; other data are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ogreg_core.data.loader import Unreadable
from ogreg_core.errors import DataError
from ogreg_core.evaluation import Scores, metrics_of
from ogreg_core.saved_scores import SCORES_FILE, SavedScores, compare, fuse, read_scores
from ogreg_core.statistics import paired_difference_interval

CLASSES = 4


def saved(seed=0, videos=12, missing=(), **about):
    """Random scores of random videos; the videos are always the same ones."""
    rng = torch.Generator().manual_seed(seed)
    targets = torch.arange(videos) * 7 % CLASSES
    rows = torch.tensor([r for r in range(videos) if r not in missing], dtype=torch.int64)
    logits = torch.randn(videos, CLASSES, generator=rng)
    logits[torch.arange(videos), targets] += 1
    scores = logits.softmax(1)[rows]
    unreadable = tuple(Unreadable(row, f"v{row}.mp4", "broken") for row in missing)
    return SavedScores(
        Scores(scores, targets[rows], rows, unreadable),
        targets,
        tuple(f"Klasse {number}" for number in range(CLASSES)),
        tuple(f"v{row}.mp4" for row in range(videos)),
        {
            "dataset": "demo",
            "split": "val",
            "manifest_sha256": "ab" * 32,
            "protocol": "16 uniform, 1x1 views, short side 72",
            "model": "ogreg-n",
            "seed": seed,
            "checkpoint": f"{seed}.safetensors",
            "experiment_sha256": "cd",
            "recipe_sha256": "ef",
            "annotated_videos": None,
            **about,
        },
    )


@pytest.mark.parametrize("missing", [(), (0, 5, 11)])
def test_the_file_gives_back_everything(missing, tmp_path):
    before = saved(missing=missing, extra=[1, None])
    before.write(tmp_path / SCORES_FILE)
    for path in (tmp_path, tmp_path / SCORES_FILE):
        after = read_scores(path)
        assert torch.equal(after.found.scores, before.found.scores)
        assert torch.equal(after.found.labels, before.found.labels)
        assert torch.equal(after.found.indices, before.found.indices)
        assert after.found.unreadable == before.found.unreadable
        assert torch.equal(after.targets, before.targets)
        assert (after.labels, after.paths) == (before.labels, before.paths)
        assert after.about == before.about
    # Others read it without ogreg: a row per video of the manifest.
    with safe_open(tmp_path / SCORES_FILE, framework="pt") as file:
        table = file.get_tensor("scores")
        assert file.get_tensor("labels").tolist() == before.targets.tolist()
    assert table.shape == (12, CLASSES)
    assert table.isnan().any(dim=1).nonzero().flatten().tolist() == list(missing)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no scores") as caught:
        read_scores(tmp_path)
    assert "does not exist" in caught.value.why
    (tmp_path / "a.safetensors").write_bytes(b"12345678nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(tmp_path / "a.safetensors")
    save_file({"scores": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="holds no scores"):
        read_scores(tmp_path / "b.safetensors")
    description = {"labels": ["a"], "paths": ["x"], "unreadable": [], "about": {}}
    save_file(
        {"scores": torch.zeros(2, 2), "labels": torch.zeros(2, dtype=torch.int64)},
        tmp_path / "c.safetensors",
        metadata={"ogreg_scores": json.dumps(description)},
    )
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_scores(tmp_path / "c.safetensors")
    assert "1 videos of 1 classes" in caught.value.why


def test_comparison_equals_a_plain_loop():
    a, b = saved(0, 40, missing=(3,)), saved(1, 40, missing=(7, 8))
    found = compare(a, b)
    tables = [
        dict(zip(s.found.indices.tolist(), s.found.scores.tolist(), strict=True)) for s in (a, b)
    ]
    outcome = {}
    for row in range(40):
        # A video without a score is wrong on that side, as in the evaluation's own top-1.
        outcome[row] = tuple(
            row in t and max(range(CLASSES), key=lambda c: t[row][c]) == row * 7 % CLASSES
            for t in tables
        )
    assert (found.videos, found.unreadable) == (40, (1, 2))
    assert found.predicted[:, [3, 7, 8]].tolist()[0][0] == -1
    assert found.predicted[1, [7, 8]].tolist() == [-1, -1]
    values = list(outcome.values())
    assert found.counts() == {
        "both_right": values.count((True, True)),
        "only_a": values.count((True, False)),
        "only_b": values.count((False, True)),
        "both_wrong": values.count((False, False)),
    }
    assert min(found.counts().values()) > 0
    assert found.top1()[0] == pytest.approx(100 * sum(r for r, _ in values) / 40)
    assert found.top1()[1] == pytest.approx(100 * sum(r for _, r in values) / 40)
    for top1, side in zip(found.top1(), (a, b), strict=True):
        own = metrics_of(side.found.scores, side.found.labels, side.missed()).top1
        assert top1 == pytest.approx(own)
    changed = [row for row, (one, other) in outcome.items() if one != other]
    assert found.changed() == changed
    counts = found.counts()
    low, high = paired_difference_interval(counts["only_a"], counts["only_b"], 40)
    assert found.interval() == pytest.approx((100 * low, 100 * high))
    assert low < (found.top1()[1] - found.top1()[0]) / 100 < high
    n, k = len(changed), min(found.counts()["only_a"], found.counts()["only_b"])
    tail = 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert found.p_value() == pytest.approx(min(1, tail))
    assert compare(a, a).p_value() == 1
    assert compare(a, a).changed() == []


@pytest.mark.parametrize(
    ("change", "word", "why"),
    [
        ({"labels": ("x", "Klasse 1", "Klasse 2", "Klasse 3")}, "classes", "class 0 is 'Klasse 0'"),
        ({"paths": (*(f"v{n}.mp4" for n in range(11)), "new.mp4")}, "videos", "row 11"),
        ({"targets": torch.zeros(12, dtype=torch.int64)}, "labels", "row 1 is 3 in A and 0 in B"),
    ],
)
def test_other_classes_and_videos_are_refused(change, word, why):
    a, b = saved(), replace(saved(1), **change)
    for act in (lambda: compare(a, b), lambda: fuse([a, b], [1, 1], ["A", "B"])):
        with pytest.raises(DataError, match=f"B was scored on other {word} than A") as caught:
            act()
        assert why in caught.value.why


def test_other_manifests_are_refused():
    a, b = saved(), saved(1, manifest_sha256="ef" * 32)
    with pytest.raises(DataError, match="other manifest rows") as caught:
        compare(a, b)
    assert "abababababab" in caught.value.where
    assert "efefefefefef" in caught.value.where
    with pytest.raises(DataError, match="other videos") as caught:
        compare(a, saved(videos=9))
    assert "12 videos in A, 9 in B" in caught.value.why


def test_fusion_is_the_weighted_mean_of_those_that_have_a_score():
    a, b, c = saved(0, missing=(2, 4)), saved(1, missing=(4, 5)), saved(2, missing=(4, 5))
    found, partly = fuse([a, b, c], [1, 2, 5], ["A", "B", "C"])
    assert partly == 2
    tables = [member.table() for member in (a, b, c)]
    expected = (tables[0] + 2 * tables[1] + 5 * tables[2]) / 8
    expected[2] = (2 * tables[1][2] + 5 * tables[2][2]) / 7
    expected[5] = tables[0][5]
    torch.testing.assert_close(found.table(), expected, equal_nan=True)
    assert [video.index for video in found.found.unreadable] == [4]
    torch.testing.assert_close(found.found.scores.sum(1), torch.ones(11))
    assert found.about["protocol"] == "fusion of 3, 16 uniform, 1x1 views, short side 72"
    assert found.about["model"] == "3 x ogreg-n"
    # What differs is null, and nothing says that it is one of the runs.
    assert found.about["seed"] is None
    assert found.about["experiment_sha256"] == found.about["checkpoint"] == ""
    assert [(part["path"], part["weight"]) for part in found.about["fused"]] == [
        ("A", 1),
        ("B", 2),
        ("C", 5),
    ]


def test_a_member_without_weight_says_nothing():
    a, b = saved(0), saved(1, missing=(3,), model="xvit", protocol="8 uniform, 1x3 views")
    found, partly = fuse([a, b], [1, 0], ["A", "B"])
    torch.testing.assert_close(found.found.scores, a.found.scores)
    assert partly == 0
    found, _ = fuse([a, b], [0, 1], ["A", "B"])
    assert [video.index for video in found.found.unreadable] == [3]
    assert found.about["model"] == "ogreg-n + xvit"
    assert found.about["protocol"].endswith("short side 72 + 8 uniform, 1x3 views")
    nothing = saved(videos=2, missing=(0, 1))
    with pytest.raises(DataError, match="not one video"):
        fuse([nothing, nothing], [1, 1], ["A", "B"])


def test_a_fusion_of_one_seed_is_of_no_seed_and_knows_its_members():
    chosen = {"dataset": "demo", "split": "val", "validations": 7, "or_more": False}
    about = {"epoch": 9, "role": "best", "chosen_on": chosen, "frames": 8, "clips": 2}
    a, b = saved(4, **about), saved(4, **about)
    found, _ = fuse([a, b], [1, 2], ["A", "B"])
    for name in ("seed", "epoch", "chosen_on"):
        assert found.about[name] is None
    assert found.about["role"] == ""
    for part in found.about["fused"]:
        assert (part["seed"], part["chosen_on"], part["frames"], part["clips"]) == (4, chosen, 8, 2)
    again, _ = fuse([found, saved(2)], [1, 1], ["AB", "C"])
    assert again.about["model"] == "2 x ogreg-n + ogreg-n"
    assert again.about["fused"][0]["fused"] == found.about["fused"]
