"""What is proposed when memory runs out: the same result first, in a form that the shell takes."""

from __future__ import annotations

import shlex

import pytest
import torch

from ogreg_core.errors import OutOfMemory
from ogreg_core.recipe import load_recipe
from ogreg_core.training.memory_advice import out_of_memory

CUDA = torch.device("cuda", 0)
PLAIN = {
    "videos": 8,
    "repeats": 2,
    "frames": 32,
    "size": 224,
    "accumulate": 2,
    "checkpoint_stages": [],
    "precision": "fp32",
    "peak_bytes": 3 * 2**30,
    "device": CUDA,
}


def advice(**changes):
    error = out_of_memory(**{**PLAIN, **changes})
    assert isinstance(error, OutOfMemory)
    return [shlex.split(line)[0] for line in error.fix.splitlines()]


def test_in_order_of_cost():
    assert advice() == [
        "train.accumulate=4",
        "train.checkpoint_stages=[1,2,3,4]",
        "train.precision=bf16",
        "data.frames=16",
        "data.size=160",
    ]


def test_what_is_known_is_said():
    error = out_of_memory(**PLAIN)
    assert error.exit_code == 5
    assert "16 clips of 32 x 224 x 224" in error.what
    assert "3.0 GB" in error.why
    assert error.where == "cuda:0"
    assert not out_of_memory(**{**PLAIN, "peak_bytes": 0}).why


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"videos": 1}, "train.accumulate"),
        ({"videos": 2, "repeats": 1}, "train.accumulate"),  # one clip alone cannot be mixed
        ({"checkpoint_stages": [1, 2, 3, 4]}, "train.checkpoint_stages"),
        ({"precision": "bf16"}, "train.precision"),
        ({"device": torch.device("cpu")}, "train.precision"),
        ({"frames": 1}, "data.frames"),
        ({"size": 32}, "data.size"),
    ],
)
def test_nothing_that_would_not_help(changes, absent):
    assert [key for key in advice() if key.startswith(absent)]
    assert not [key for key in advice(**changes) if key.startswith(absent)]


def test_an_odd_micro_batch_is_divided_by_what_divides_it():
    assert advice(videos=9)[0] == "train.accumulate=6"


def test_the_recipe_takes_every_proposal():
    start = ["train.batch_size=16", "data.frames=32", "data.size=224", "data.short_side=224"]
    for key in advice():
        load_recipe("demo", [*start, "train.accumulate=2", key])
