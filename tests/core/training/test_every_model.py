"""Every architecture of the registry the whole way: recipe, training, checkpoint, evaluation, prediction
and gaze.

What a model computes is tested beside it (``tests/core/models``), and so are torch.compile and that its
layers hold every parameter once without token selection (``tests/core/training/test_optim.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ogreg_core.data.loader import TrainBatch, batches, load_views
from ogreg_core.data.manifest import load_manifest
from ogreg_core.data.transforms import to_input
from ogreg_core.evaluation import autocast
from ogreg_core.gaze import look, meanings_of, save_sheet
from ogreg_core.inference import Predictor
from ogreg_core.models.registry import MODELS
from ogreg_core.models.stts_backbones import TokenSelecting
from ogreg_core.runs import RunFolder
from ogreg_core.training.loop import Trainer
from ogreg_core.training.optim import OptimSettings, parameter_groups
from tests.every_model import CPU, architectures, eight_clips, evaluate, one_thread, trainer_from

FRAMES = 8


@dataclass(frozen=True)
class Row:
    """One architecture, or one with token selection.

    Args:
        model: name in the registry.
        lr: with which it learns eight clips from scratch.
        steps: after which it knows them, on whatever processor: of four to six seeds none had a loss above 0.07.
        bf16: how far bf16 autocast may move its logits, as a share of the largest; about three times
            what was measured; with token selection more, since rounding may change a choice, and with
            batch norms, whose statistics of few clips magnify rounding, the more the smaller the
            variance that the training ended with (S3D: 0.013 on one processor, 0.043 on another).
        size: of the clips, pixels; their frames are eight.
        options: overrides of the recipe that belong to the model.
        time, space: before which stage (MViT: block) half of the frames, and 0.6 of their positions,
            are kept.
        no_bf16_step: why training in bf16 cannot be tested here.
    """

    model: str
    lr: float
    steps: int
    bf16: float
    size: int = 64
    options: tuple[str, ...] = ()
    time: int | None = None
    space: int | None = None
    no_bf16_step: str = ""

    @property
    def selects(self) -> bool:
        return self.time is not None

    @property
    def drops_paths(self) -> bool:
        """torchvision's convolutional networks have no stochastic depth and refuse it."""
        return self.model not in ("r2plus1d-n", "s3d-n")

    def overrides(self) -> list[str]:
        changes = ["model.options={}", *self.options]
        if self.selects:
            time, space = (
                f"{{before={self.time}, ratio=0.5}}",
                f"{{before={self.space}, ratio=0.6}}",
            )
            changes.append(f"model.token_selection={{time=[{time}], space=[{space}], samples=50}}")
        return changes


# torch 2.15: gradients of (3, 1, 1) kernels over volumes of 2x2x2 positions are not numbers in bf16 on
# the CPU, whatever the model; the last stages of small clips are such volumes.
CPU_CONVOLUTION = (
    "torch's bf16 gradient of temporal convolutions over tiny volumes is broken on CPUs"
)
FINE = ("model.options.strides=[2,1,1,1]",)
ROWS = [
    Row("ogreg-n", 1e-3, 40, 0.012, size=32, options=FINE),
    Row("video-focalnet-n", 2e-3, 60, 0.015, size=32),
    Row("xvit-n", 1e-3, 100, 0.012, size=32, options=("init.linear=fan-in",)),
    Row("gta-n", 5e-3, 60, 0.1, size=32),
    Row("swin3d-n", 1e-3, 60, 0.012, size=32),
    Row("mvit-v1-n", 1e-3, 110, 0.015, size=32),
    Row("mvit-v2-n", 1e-3, 60, 0.012, size=32),
    Row("r2plus1d-n", 2e-3, 60, 0.1, size=32, no_bf16_step=CPU_CONVOLUTION),
    Row("s3d-n", 1e-3, 80, 0.1, size=32, no_bf16_step=CPU_CONVOLUTION),
    Row("ogreg-n", 2e-3, 80, 0.1, size=32, options=FINE, time=1, space=2),
    Row("mvit-v1-n", 1e-3, 140, 0.1, size=32, time=0, space=2),
    Row("swin3d-n", 1e-3, 120, 0.1, size=32, time=0, space=1),
]
NAMES = [f"{row.model}-selecting" if row.selects else row.model for row in ROWS]


@pytest.fixture(scope="module", autouse=True)
def small_layers() -> Iterator[None]:
    with one_thread():
        yield


# --- one training per row ----------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A row after its training.

    Args:
        row: what was trained.
        data: folder of its data set; the validation split holds the eight clips.
        run: its run folder.
        trainer: as it was when the training ended.
        predictor: the loaded checkpoint.
    """

    row: Row
    data: Path
    run: RunFolder
    trainer: Trainer
    predictor: Predictor


def trainer_of(row: Row, data: Path, folder: Path, *overrides: str) -> Trainer:
    """By the ordinary path, without anything drawn at random but the frames of a clip."""
    plain = [
        *("train.epochs=1", "train.batch_size=8", "train.warmup_epochs=0.15", f"train.lr={row.lr}"),
        *("train.label_smoothing=0.0", "model.drop_path=0.0"),
        *(f"data.frames={FRAMES}", f"data.size={row.size}", f"data.short_side={row.size}"),
        *("augment.scale=[1.0,1.0]", "augment.ratio=[1.0,1.0]", "augment.color_jitter=0.0"),
    ]
    changes = [f"data.root={data}", f"model.name={row.model}", *row.overrides(), *plain]
    return trainer_from("demo", [*changes, *overrides], folder)


@pytest.fixture(scope="module", params=ROWS, ids=NAMES)
def trained(
    request: pytest.FixtureRequest, demo_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    row: Row = request.param
    folder = tmp_path_factory.mktemp(row.model)
    data = eight_clips(demo_root, folder / "data", row.steps)
    trainer = trainer_of(row, data, folder / "run")
    trainer.fit()
    predictor = Predictor.from_checkpoint(trainer.run.last, CPU)
    return Trained(row, data, trainer.run, trainer, predictor)


def test_a_row_for_every_architecture_and_every_place_of_token_selection() -> None:
    assert architectures(row.model for row in ROWS if not row.selects) == architectures(MODELS)
    places = [name for name, entry in MODELS.items() if entry.places]
    assert architectures(row.model for row in ROWS if row.selects) == architectures(places)


def validation_clips(trained: Trained) -> Tensor:
    """The eight clips as the model gets them, ``[8, 3, T, H, W]``."""
    info = trained.predictor.info
    manifest = load_manifest(trained.data, "val")
    clips = torch.cat([load_views(manifest, row, info.views()) for row in manifest.rows])
    return to_input(clips, info.mean, info.std)


@dataclass(frozen=True)
class FirstStep:
    """What the first step of a training did.

    Args:
        loss: summed over the clips.
        gradients: by parameter, after clipping.
        buffers: of the model afterwards, such as running statistics.
        parts: micro-batches.
        kept: bytes of activations that the forward passes kept for the backward passes.
    """

    loss: float
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    parts: int
    kept: int


def first_step(trainer: Trainer) -> FirstStep:
    model, kept = trainer.step.model, 0
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in own:
            kept += tensor.numel() * tensor.element_size()
        return tensor

    parts = first_parts(trainer)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = trainer.step(parts, 0, 0)
    return FirstStep(
        result.loss_sum,
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        dict(model.named_buffers()),
        len(parts),
        kept,
    )


def first_parts(trainer: Trainer) -> list[TrainBatch]:
    """The micro-batches of the first step."""
    trainer.order.set_position(0)
    return list(islice(batches(trainer.loader), trainer.order.accumulate))


class TestWholeWay:
    def test_eight_clips_are_learnt(self, trained: Trained) -> None:
        """Scored by the checkpoint that was loaded, not by the model that was trained."""
        report = evaluate(trained.run.last)
        assert report.metrics.top1 == 100.0
        assert report.metrics.videos == 8
        assert isinstance(trained.predictor.model, TokenSelecting) == trained.row.selects

    def test_evaluation_and_prediction_repeat_the_validation(self, trained: Trained) -> None:
        """Logarithms too: scores near 1 would hide how far logits are apart."""
        assert trained.trainer.validation is not None
        expected = trained.trainer.validation.scores.scores
        found = evaluate(trained.run.last).scores.scores
        manifest = load_manifest(trained.data, "val")
        predicted = trained.predictor.predict(manifest.video(manifest.rows[5]))
        assert predicted.top[0][0] == manifest.labels[manifest.rows[5].label]
        for scores, wanted in ((found, expected), (predicted.scores, found[5])):
            torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)
            torch.testing.assert_close(scores.log(), wanted.log(), atol=1e-4, rtol=1e-5)

    def test_gaze_and_glance_are_drawn(
        self, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        row, manifest = trained.row, load_manifest(trained.data, "val")
        found = look(trained.predictor, manifest.video(manifest.rows[0]))
        # With token selection what is left is shown, and none of the backbone's own maps.
        kinds = {"kept"} if row.selects else set(MODELS[row.model].maps)
        assert set(found.maps) == set(meanings_of(trained.predictor.info, found)) == kinds
        for maps in found.maps.values():
            assert maps.shape == (FRAMES, row.size, row.size)
            assert math.isfinite(maps.sum())
            assert maps.min() >= 0
            assert maps.max() > maps.min()
        assert all(
            torch.from_numpy(curve).isfinite().all()
            for curves in found.profiles.values()
            for curve in curves.values()
        )
        assert found.label == manifest.labels[manifest.rows[0].label]
        figures: list[Figure] = []
        draw = Figure.savefig

        def watched(figure: Figure, *arguments: Any, **choices: Any) -> None:
            figures.append(figure)
            draw(figure, *arguments, **choices)

        monkeypatch.setattr(Figure, "savefig", watched)
        sheet = tmp_path / "sheet.png"
        save_sheet(found, sheet, row.model)
        # Every curve lies within its picture, whatever its sign.
        for axes in figures[0].axes:
            low, high = axes.get_ylim()
            assert all(low <= y <= high for line in axes.lines for y in line.get_ydata())
        with Image.open(sheet) as picture:
            assert picture.width > 1000
            # The colours of frames and maps, not a blank page.
            assert len(picture.convert("RGB").getcolors(2**24)) > 1000


class TestOneStep:
    """Of untrained weights on the first batch, by the trainer of the recipe."""

    def test_micro_batches_make_the_same_step(self, trained: Trained, tmp_path: Path) -> None:
        row = trained.row
        # A selection draws its noise per micro-batch: almost none here.
        quiet = ["model.token_selection.sigma=1e-30"] if row.selects else []
        whole = trainer_of(row, trained.data, tmp_path / "whole", *quiet)
        if any(isinstance(module, _BatchNorm) for module in whole.step.model.modules()):
            pytest.skip("batch norm sees one micro-batch at a time")
        halves = trainer_of(row, trained.data, tmp_path / "halves", "train.accumulate=2", *quiet)
        expected, found = first_step(whole), first_step(halves)
        assert (expected.parts, found.parts) == (1, 2)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.gradients.keys() == expected.gradients.keys()
        difference, size = (
            torch.cat([gradient.flatten() for gradient in gradients]).norm()
            for gradients in (
                [found.gradients[name] - value for name, value in expected.gradients.items()],
                list(expected.gradients.values()),
            )
        )
        assert difference < 1e-4 * size

    def test_recomputed_stage_gives_the_same_gradients(
        self, trained: Trained, tmp_path: Path
    ) -> None:
        """Bit for bit, with dropout and drop path."""
        row = trained.row
        lively = ["model.dropout=0.3", *(["model.drop_path=0.3"] if row.drops_paths else [])]
        plain, again = (
            first_step(trainer_of(row, trained.data, tmp_path / name, *lively, stages))
            for name, stages in (
                ("plain", "train.checkpoint_stages=[]"),
                ("again", "train.checkpoint_stages=[2]"),
            )
        )
        assert again.kept < plain.kept
        assert again.loss == plain.loss
        for name, gradient in plain.gradients.items():
            assert torch.equal(again.gradients[name], gradient), name
        for name, value in plain.buffers.items():
            assert torch.equal(again.buffers[name], value), name

    def test_bf16_moves_the_logits_of_the_trained_model_a_little(self, trained: Trained) -> None:
        clips, model = validation_clips(trained), trained.predictor.model
        with torch.inference_mode():
            expected = model(clips)
            with autocast(CPU, "bf16"):
                found = model(clips)
        assert found.dtype == torch.bfloat16
        gaps = (found.float() - expected).abs().amax(dim=1) / expected.abs().max()
        # Rounding may change the hard choice of a clip, and with it the tokens that go on.
        gap = float(gaps.median() if trained.row.selects else gaps.max())
        assert 0 < gap < trained.row.bf16

    def test_bf16_steps_lower_the_loss(self, trained: Trained, tmp_path: Path) -> None:
        if trained.row.no_bf16_step:
            pytest.skip(trained.row.no_bf16_step)
        trainer = trainer_of(trained.row, trained.data, tmp_path / "run", "train.precision=bf16")
        parts = first_parts(trainer)
        results = [trainer.step(parts, 0, number) for number in range(6)]
        assert all(math.isfinite(result.grad_norm) for result in results)
        assert results[-1].loss_sum < results[0].loss_sum

    def test_parameter_groups_hold_every_parameter_once(self, trained: Trained) -> None:
        """By layer, the classifier last and alone; what does not decay is a parameter."""
        model: Any = trained.trainer.step.model
        groups = parameter_groups(model, OptimSettings(1.0, 0.1, layer_decay=0.5))
        names = [name for group in groups for name in group.parameters]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        for name, _ in model.named_parameters():
            owners = [
                number
                for number, layer in enumerate(model.layers())
                if any(name == prefix or name.startswith(f"{prefix}.") for prefix in layer)
            ]
            assert len(owners) == 1, name
            assert (owners[0] == len(model.layers()) - 1) == name.startswith("head."), name
        head = [name for group in groups if group.lr == 1.0 for name in group.parameters]
        assert all(name.startswith("head.") for name in head)
        exempt = {name for group in groups if not group.weight_decay for name in group.parameters}
        assert exempt == set(model.no_weight_decay())
        blocks = [block for stage in model.stage_blocks() for block in stage]
        assert len({id(block) for block in blocks}) == len(blocks)
        assert {id(block) for block in blocks} <= {id(module) for module in model.modules()}
