"""Killed at any moment and continued, alone or as one of two processes: the run that was not killed."""

from __future__ import annotations

import json
import random
import shutil
import time

import pytest
import torch

from ogreg_core.checkpoint import load_checkpoint
from ogreg_core.distributed import join
from ogreg_core.errors import CheckpointError
from ogreg_core.progress import ignore_progress
from ogreg_core.recipe import load_recipe
from ogreg_core.runs import RunFolder
from ogreg_core.training.assemble import build_trainer
from ogreg_core.training.splits import describe_run, load_splits
from ogreg_core.training.state import differences
from tests import ranks
from tests.conftest import TINY

LIVELY = [
    *TINY,
    "train.epochs=3",
    "train.ema=0.99",
    "train.precision=bf16",
    "model.drop_path=0.2",
    "augment.mixup=0.2",
    "augment.cutmix=1.0",
    "augment.erasing=0.5",
    "eval.every=2",
]


def train(root, folder, workers, save_seconds, *overrides):
    """A whole training, or what is left of it; returns the final weights."""
    loaded = load_recipe("demo", [f"data.root={root}", *LIVELY, *overrides])
    splits = load_splits(loaded.recipe)
    run = RunFolder(folder)
    with join("cpu") as (world, device):
        if world.is_main and not folder.exists():
            folder.mkdir()
            describe_run(run, loaded, splits)
        world.barrier()
        trainer = build_trainer(
            loaded,
            splits,
            run,
            device=device,
            workers=workers,
            on_progress=ignore_progress,
            world=world,
            save_seconds=save_seconds,
        )
        if world.broadcast(run.state.is_file()):
            trainer.resume()
        trainer.fit()
        return {name: p.detach().numpy() for name, p in trainer.step.model.named_parameters()}


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = ("kind", "epoch", "step", "loss", "top1_batch", "top1", "lr", "grad_norm")
    return [{key: r[key] for key in kept if key in r} for r in map(json.loads, lines)]


def assert_same_run(folder, reference):
    assert records(folder) == records(reference)
    for name in ("best", "last"):
        found, about = load_checkpoint(folder / "checkpoints" / f"{name}.safetensors")
        expected, before = load_checkpoint(reference / "checkpoints" / f"{name}.safetensors")
        assert (about.epoch, about.metrics) == (before.epoch, before.metrics)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def train_silently(*arguments):
    """Without the weights, which would keep the process until somebody has taken them."""
    train(*arguments)


def lines_of(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def position_of(folder):
    """Where a run would go on: (epoch, step within it)."""
    if not (folder / "checkpoints" / "state.pt").exists():
        return None
    state = torch.load(folder / "checkpoints" / "state.pt", weights_only=True)
    return state["position"]["epoch"], state["position"]["batch"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("size", "workers", "kills"), [(1, 0, 20), (1, 2, 2), (2, 0, 5), (2, 2, 1)]
)
def test_killed_at_random_moments(size, workers, kills, demo_root, tmp_path):
    """SIGKILL to one process of the job, wherever it is: starting, loading, stepping, validating,
    saving.
    """
    ranks.run(size, train, demo_root, tmp_path / "whole", workers, 600.0)
    folder = tmp_path / "killed"
    moments = random.Random(size * 10 + workers)
    positions = set()
    for attempt in range(kills):
        # Two of three save after each step, so that kills fall into saving and the run moves on.
        pause = 0.0 if attempt % 3 else 600.0
        processes, _ = ranks.start(size, train_silently, demo_root, folder, workers, pause)
        victim = moments.choice(processes)
        # After none to three more records, and then a little later.
        wanted = lines_of(folder) + moments.randint(0, 3)
        until = time.monotonic() + 20
        while victim.is_alive() and lines_of(folder) < wanted and time.monotonic() < until:
            time.sleep(0.005)
        victim.join(moments.uniform(0.0, 0.3))
        victim.kill()
        for process in processes:
            # What a launcher does when one of its processes has died.
            process.kill()
            process.join()
        positions.add(position_of(folder))
    in_the_middle = [found for found in positions if found and 0 < found[1] < 6]
    assert kills < 20 or in_the_middle
    ranks.run(size, train, demo_root, folder, workers, 600.0)
    assert_same_run(folder, tmp_path / "whole")
    leftovers = [p.name for p in (folder / "checkpoints").iterdir() if p.suffix == ".tmp"]
    assert [name for name in leftovers if name.startswith(".state")] == []


def test_how_and_where_may_change(demo_root, tmp_path):
    """What an error advises to change, and a data set that has moved: the same weights."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(demo_root, copy)
    whole = train(demo_root, tmp_path / "whole", 0, 600.0, "train.epochs=1")
    train(demo_root, tmp_path / "run", 0, 600.0, "train.epochs=1")
    state = tmp_path / "run/checkpoints/state.pt"
    assert position_of(tmp_path / "run") == (1, 0)
    content = torch.load(state, weights_only=True)
    assert "data.root" not in content["identity"]
    changes = ("train.checkpoint_stages=[1,2]", "train.max_unreadable=0.5")
    again = train(copy, tmp_path / "run", 0, 600.0, "train.epochs=1", *changes)
    assert all((again[name] == value).all() for name, value in whole.items())


def test_what_has_changed_is_said(demo_root, tmp_path):
    train(demo_root, tmp_path / "run", 0, 600.0, "train.epochs=1")
    with pytest.raises(CheckpointError, match="cannot be continued") as caught:
        train(
            *(demo_root, tmp_path / "run", 0, 600.0, "train.epochs=1"),
            *("train.lr=2e-3", "train.batch_size=16", "model.drop_path=0.2"),
        )
    assert caught.value.why.splitlines() == [
        "train.batch_size: 8 then, 16 now",
        "train.lr: 0.0008 then, 0.002 now",
        "clips per step: 8 then, 16 now",
    ]
    assert "--init-from" in caught.value.fix


def test_other_data_are_refused(demo_root, tmp_path):
    copy = tmp_path / "demo"
    shutil.copytree(demo_root, copy)
    train(copy, tmp_path / "run", 0, 600.0, "train.epochs=1")
    lines = (copy / "train.csv").read_text().splitlines(keepends=True)
    (copy / "train.csv").write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError) as caught:
        train(copy, tmp_path / "run", 0, 600.0, "train.epochs=1")
    assert caught.value.why.startswith("training manifest: 48 videos (")
    assert "47 videos" in caught.value.why


def test_names_that_come_and_go_are_differences():
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == [
        "b: 2 then, nothing now",
        "c: nothing then, 3 now",
    ]
    assert differences({"a": [1]}, {"a": [1]}) == []
