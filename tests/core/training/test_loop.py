"""The loop against a hand-written one, resuming against not stopping, and its failures."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ogreg_core.data.transforms import to_input
from ogreg_core.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    OutOfMemory,
    UsageError,
    WorkFailed,
)
from ogreg_core.progress import Note, Progress, ignore_progress
from ogreg_core.recipe import load_recipe
from ogreg_core.runs import RunFolder
from ogreg_core.training.assemble import build_trainer
from ogreg_core.training.splits import describe_run, load_splits
from ogreg_core.training.state import Position, load_state, save_state
from tests import ranks
from tests.conftest import TINY

# Everything on that draws at random.
LIVELY = [
    *TINY,
    "train.epochs=3",
    "train.warmup_epochs=1",
    "model.drop_path=0.2",
    "augment.mixup=0.2",
    "augment.cutmix=1.0",
    "augment.erasing=0.5",
    "augment.repeats=2",
    "augment.rand_augment=rand-m7-n2",
]


def trainer_for(demo_root, folder, *overrides, workers=0, on_progress=ignore_progress):
    loaded = load_recipe("demo", [f"data.root={demo_root}", *LIVELY, *overrides])
    folder.mkdir(exist_ok=True)
    splits = load_splits(loaded.recipe)
    describe_run(RunFolder(folder), loaded, splits)
    return build_trainer(
        loaded,
        splits,
        RunFolder(folder),
        device=torch.device("cpu"),
        workers=workers,
        on_progress=on_progress,
    )


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if '"train"' in line]


def test_steps_equal_a_plain_loop(demo_root, tmp_path):
    plain = (
        "augment.mixup=0.0",
        "augment.cutmix=0.0",
        "augment.erasing=0.0",
        "model.drop_path=0.0",
        "train.epochs=1",
        "train.label_smoothing=0.0",
    )
    trainer = trainer_for(demo_root, tmp_path / "a", *plain)
    trainer.fit()
    other = trainer_for(demo_root, tmp_path / "b", *plain)
    step = other.step
    model, optimizer, schedule = step.model.train(), step.optimizer, step.schedule
    expected = []
    for batch, labels, *_ in other.loader:
        clips = to_input(batch, step.settings.mean, step.settings.std)
        loss = F.cross_entropy(model(clips), F.one_hot(labels, 16).float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        expected.append(loss.item())
    assert losses(tmp_path / "a") == expected
    for a, b in zip(
        trainer.step.model.state_dict().values(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop_after", [2, 6, 9])
def test_resuming_is_exact_within_and_between_epochs(stop_after, demo_root, tmp_path):
    """Six steps an epoch; a signal after step 2 or 9 stops inside an epoch, after 6 at its end."""
    whole = trainer_for(demo_root, tmp_path / "whole")
    whole.fit()

    steps = 0

    def interrupt(event):
        nonlocal steps
        if isinstance(event, Progress) and event.task.startswith("epoch "):
            steps += 1
            if steps == stop_after:
                signal.raise_signal(signal.SIGTERM)

    broken = trainer_for(demo_root, tmp_path / "broken", on_progress=interrupt)
    with pytest.raises(Interrupted) as caught:
        broken.fit()
    assert caught.value.exit_code == 143
    assert "--resume" in caught.value.fix
    torch.manual_seed(12345)
    resumed = trainer_for(demo_root, tmp_path / "broken")
    resumed.resume()
    # What comes after the processes have agreed on a step is heard at the next one.
    assert resumed.position.step in (stop_after, stop_after + 1)
    resumed.fit()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    for a, b in zip(
        whole.step.model.state_dict().values(),
        resumed.step.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert resumed.position.best_top1 == whole.position.best_top1


def test_stopping_in_validation_repeats_only_the_validation(demo_root, tmp_path):
    whole = trainer_for(demo_root, tmp_path / "whole")
    whole.fit()

    def interrupt(event):
        if event.task == "validate" and broken.position.step == 12:
            signal.raise_signal(signal.SIGINT)

    broken = trainer_for(demo_root, tmp_path / "broken", on_progress=interrupt)
    with pytest.raises(Interrupted) as caught:
        broken.fit()
    assert caught.value.exit_code == 130
    resumed = trainer_for(demo_root, tmp_path / "broken")
    resumed.resume()
    assert (resumed.position.epoch, resumed.position.batch) == (1, 6)
    resumed.fit()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert resumed.validation.metrics == whole.validation.metrics


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_videos_are_replaced_counted_and_limited(workers, demo_root, tmp_path):
    copy = tmp_path / "demo"
    shutil.copytree(demo_root, copy)
    gone = sorted((copy / "train").rglob("*.mp4"))[7]
    gone.unlink()
    trainer = trainer_for(copy, tmp_path / "strict", workers=workers)
    with pytest.raises(DataError, match="1 training videos") as caught:
        trainer.fit()
    assert gone.name in caught.value.where
    notes = []
    patient = trainer_for(
        copy,
        tmp_path / "patient",
        "train.max_unreadable=0.05",
        workers=workers,
        on_progress=lambda event: notes.append(event) if isinstance(event, Note) else None,
    )
    patient.fit()
    assert sum(gone.name in note.text for note in notes) == 3
    lines = (tmp_path / "patient/metrics.jsonl").read_text().splitlines()
    named = [json.loads(line).get("unreadable") for line in lines if '"train"' in line]
    assert sum(found == [str(gone.relative_to(copy))] for found in named) == 3


def test_seed_decides_everything(demo_root, tmp_path):
    runs = [("a", "seed=1"), ("b", "seed=1"), ("c", "seed=2")]
    for name, seed in runs:
        trainer_for(demo_root, tmp_path / name, seed, "train.epochs=1").fit()
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


def test_a_loss_that_is_not_finite_names_the_videos(demo_root, tmp_path):
    trainer = trainer_for(demo_root, tmp_path / "run")
    with torch.no_grad():
        trainer.step.model.head.weight.fill_(float("nan"))
    with pytest.raises(WorkFailed, match="nan") as caught:
        trainer.fit()
    assert caught.value.where.count(".mp4") == 8


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(demo_root, tmp_path):
    trainer = trainer_for(demo_root, tmp_path / "run", "train.clip_grad=0.0")
    trainer.step.model.head.bias.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(WorkFailed, match="gradient is not finite") as caught:
        trainer.fit()
    assert caught.value.where.count(".mp4") == 8
    _, parts = load_state(trainer.run.state, trainer.settings.identity)
    assert all(value.isfinite().all() for value in parts["model"].values())


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    run = RunFolder(tmp_path)
    held = run.own()
    with pytest.raises(UsageError, match="another process is training") as caught:
        run.own()
    assert "process" in caught.value.why
    held.close()
    run.own().close()


def test_run_folder_explains_itself(demo_root, tmp_path):
    folder = tmp_path / "run"
    trainer_for(demo_root, folder, "train.epochs=1").fit()
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.toml", "env.json", "data.json", "metrics.jsonl"} <= names
    assert load_recipe(str(folder / "recipe.toml")).recipe.train.epochs == 1
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["train"] * 6 + ["val"]
    assert 0 <= records[-1]["top1"] <= 100
    assert any((folder / "tensorboard").glob("events*"))


def test_a_broken_state_file_is_refused(tmp_path):
    path = tmp_path / "checkpoints" / "state.pt"
    with pytest.raises(CheckpointError, match="no state to resume"):
        load_state(path, {})
    path.parent.mkdir()
    path.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(path, {})


def test_a_failed_save_keeps_the_old_state(tmp_path, demo_root, monkeypatch):
    trainer = trainer_for(demo_root, tmp_path / "run")
    trainer.save()

    def full_disk(*_arguments):
        raise OSError(28, "No space left on device")

    trainer.position.step = 99
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_state(trainer.run.state, trainer.position, {}, {})
    monkeypatch.undo()
    assert load_state(trainer.run.state, trainer.settings.identity)[0].step == 0


def test_a_state_file_that_would_run_code_is_refused(tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    path = tmp_path / "checkpoints" / "state.pt"
    path.parent.mkdir()
    torch.save({"position": {}, "identity": {}, "parts": Malicious()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(path, {})
    assert not (tmp_path / "owned").exists()


def save_on_a_full_disk(path):
    """In a process of its own, which may not write files of more than a megabyte."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        save_state(path, Position(step=9), {}, {"model": torch.zeros(2**20)})
    except Exception as error:
        return type(error).__name__
    return "saved"


def test_a_disk_that_fills_up_leaves_the_state_before(tmp_path):
    path = tmp_path / "checkpoints" / "state.pt"
    path.parent.mkdir()
    save_state(path, Position(step=5), {}, {"model": torch.zeros(8)})
    assert ranks.run(1, save_on_a_full_disk, path) != ["saved"]
    position, parts = load_state(path, {})
    assert position.step == 5
    assert torch.equal(parts["model"], torch.zeros(8))
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:115] . DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_too_little_memory_says_what_to_lower(error, demo_root, tmp_path, monkeypatch):
    trainer = trainer_for(demo_root, tmp_path / "run")

    def fail(*_arguments):
        raise error

    monkeypatch.setattr(trainer.step, "_loss", fail)
    with pytest.raises(OutOfMemory, match="16 clips of 4 x 32 x 32") as caught:
        trainer.fit()
    assert caught.value.fix.splitlines()[0].startswith("train.accumulate=2")
    assert "train.checkpoint_stages=[1,2,3,4]" in caught.value.fix
    # What was saved before the step is still there.
    assert load_state(trainer.run.state, trainer.settings.identity)[0].step == 0


def test_flags_change_what_they_say(demo_root, tmp_path):
    trainer = trainer_for(demo_root, tmp_path / "run", "train.clip_grad=0.0", "eval.every=2")
    trainer.fit()
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    validated = [json.loads(r)["epoch"] for r in records if '"val"' in r]
    assert validated == [2, 3]
