"""Exported programs compute what their models do, and describe themselves."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ogreg_core import export, export_formats
from ogreg_core.checkpoint import CheckpointInfo, load_model, save_checkpoint
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import to_input
from ogreg_core.errors import CheckpointError, EnvironmentFault, UsageError, WorkFailed
from ogreg_core.export import Choice, Traced, read_exported, trace_checkpoint
from ogreg_core.inference import Predictor
from ogreg_core.models import ogreg, torchvision_models, video_focalnet
from ogreg_core.models.registry import MODELS, create_model
from ogreg_core.progress import Note, Progress, ignore_progress
from tests.conftest import moving_frames
from tests.every_model import CPU, architectures, one_thread
from tests.thin import one_block_a_stage

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
FINE = {"strides": [2, 1, 1, 1]}
SELECTING = {
    "time": [{"before": 0, "ratio": 0.5}],
    "space": [{"before": 1, "ratio": 0.6}],
}


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    """One block per stage of some: tracing takes as long as there are operators."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        swin = torchvision_models.SWIN["swin3d_n"]
        one_block_a_stage(patch, torchvision_models.MVIT, "mvit_v1_n")
        patch.setitem(torchvision_models.SWIN, "swin3d_n", replace(swin, depths=(1, 1, 1, 1)))
        one_block_a_stage(patch, ogreg.VARIANTS)
        one_block_a_stage(patch, video_focalnet.VARIANTS)
        yield


LABELS = ["clap", "wave", "größer", "sit", "run"]


def saved(folder: Path, model: str = "ogreg-n", size: int = 32, **options: Any) -> Path:
    """A checkpoint with random weights, whose scores are apart."""
    torch.manual_seed(3)
    options = options or (FINE if model == "ogreg-n" else {})
    info = CheckpointInfo(
        model,
        options,
        LABELS,
        ClipSampling("uniform", 8),
        size,
        size + 4,
        MEAN,
        STD,
        crops=3,
        data_folder="/somebody/s/data",
        recipe="mine",
        metrics={"top1": 12.5},
    )
    net = create_model(model, len(LABELS), frames=8, size=size, **options)
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        # Statistics of these clips: with those of the beginning all clips look the same behind it.
        norm.momentum = 1.0
    with torch.no_grad():
        if norms:
            net.train()(to_input(some_frames(5, size).permute(0, 4, 1, 2, 3), MEAN, STD))
        [p for p in net.parameters() if p.ndim > 1][-1].mul_(5)
    path = folder / "model.safetensors"
    save_checkpoint(path, net.state_dict(), info)
    return path


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    """ogreg-n, waiting to be written."""
    choice = Choice(licence="CC BY 4.0")
    return trace_checkpoint(saved(tmp_path_factory.mktemp("own")), choice, ignore_progress)


def by_hand(checkpoint: Path, frames: Tensor) -> Tensor:
    """Logits of uint8 ``[B, T, H, W, 3]``, with nothing of the exporter."""
    model, _ = load_model(checkpoint)
    pixels = frames.double().div(255).sub(torch.tensor(MEAN)).div(torch.tensor(STD))
    with torch.no_grad():
        logits: Tensor = model(pixels.permute(0, 4, 1, 2, 3).float())
    return logits


def some_frames(count: int, size: int = 32) -> Tensor:
    """uint8 ``[count, 8, size, size, 3]``, each clip another."""
    clips = [torch.from_numpy(moving_frames(8, size, size, seed)) for seed in range(count)]
    return torch.stack(clips)


# --- every architecture ------------------------------------------------------------------------

ROWS: list[tuple[str, int, dict[str, Any]]] = [
    ("ogreg-n", 32, FINE),
    ("video-focalnet-n", 32, {}),
    ("xvit-n", 32, {}),
    ("gta-n", 32, {}),
    ("swin3d-n", 64, {}),
    ("mvit-v1-n", 32, {}),
    ("r2plus1d-n", 32, {}),
    ("swin3d-n", 64, {"token_selection": SELECTING}),
]
# Left out: mvit-v2-n and s3d. They export, too, in half a minute each, and hold no operator that the
# others do not.
LEFT_OUT = {"mvit-v2-n", "s3d-n"}
SLOW = {"gta-n"}


def test_a_row_for_every_architecture() -> None:
    assert architectures({row[0] for row in ROWS} | LEFT_OUT) == architectures(MODELS)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        pytest.param(
            *row,
            id=f"{row[0]}-selecting" if "token_selection" in row[2] else row[0],
            marks=[pytest.mark.slow] if row[0] in SLOW else [],
        )
        for row in ROWS
    ],
)
def test_every_architecture_with_any_number_of_clips(
    tmp_path: Path, name: str, size: int, options: dict[str, Any]
) -> None:
    checkpoint = saved(tmp_path, name, size, **options)
    traced = trace_checkpoint(checkpoint, Choice(), ignore_progress)
    found = traced.write(tmp_path / "own.pt2", export.test_clips(traced.info, None))
    assert [one.batch for one in found] == [1, 3]
    assert all(one.holds and one.range > 1e-2 for one in found)
    frames = some_frames(5, size)
    scores = traced.program.module()(frames)
    # Logarithms: scores near 1 would hide how far logits are apart. Norms of like clips enlarge rounding.
    expected = by_hand(checkpoint, frames).log_softmax(-1)
    width = float(expected.amax() - expected.amin())
    torch.testing.assert_close(scores.log(), expected, atol=1e-3 * width, rtol=0)
    # Clips are not all alike: a constant would not do.
    assert expected.std(dim=0).max() > 1e-3


# --- the two inputs, the batch -----------------------------------------------------------------


def test_normalised_clips_to_logits_in_a_fixed_batch(tmp_path: Path) -> None:
    checkpoint, target = saved(tmp_path, "r2plus1d-n"), tmp_path / "own.pt2"
    traced = trace_checkpoint(checkpoint, Choice(input="clip", batch=2), ignore_progress)
    found = traced.write(target, export.test_clips(traced.info, None))
    assert [one.batch for one in found] == [2]
    exported = read_exported(target)
    assert exported.document["input"] == {
        "name": "clip",
        "dtype": "float32",
        "layout": "BCTHW",
        "shape": [2, 3, 8, 32, 32],
        "colours": "RGB",
        "range": None,
        "normalised": True,
    }
    assert exported.document["output"] == {"name": "logits", "dtype": "float32", "shape": [2, 5]}
    run, clip = exported.open(), torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(run(clip), load_model(checkpoint)[0](clip))
    with pytest.raises(AssertionError, match="2"):
        run(clip[:1])


def test_scores_of_a_video_are_those_of_predict(
    traced: Traced, tmp_path: Path, encode: Callable[..., Path]
) -> None:
    video = encode("clip.mp4", moving_frames(30, 48, 64))
    clips = export.test_clips(traced.info, video)
    traced.write(tmp_path / "own.pt2", clips)
    predictor = Predictor.from_checkpoint(traced.checkpoint, CPU)
    expected = predictor.predict(video, predictor.info.views(clips=1, crops=1)).scores
    run = read_exported(tmp_path / "own.pt2").open()
    torch.testing.assert_close(run(clips[:1].permute(0, 2, 3, 4, 1))[0], expected)
    assert torch.equal(clips[1], clips[0].flip(1))
    assert torch.equal(clips[2], clips[0].flip(-1))


# --- what stands in the file -------------------------------------------------------------------


def test_the_file_describes_itself(traced: Traced, tmp_path: Path) -> None:
    target = tmp_path / "own.pt2"
    traced.write(target, export.test_clips(traced.info, None))
    exported = read_exported(target)
    original = load_model(traced.checkpoint)[1]
    assert exported.info.data_folder == ""
    assert {**vars(exported.info), "data_folder": "/somebody/s/data"} == vars(original)
    document = exported.document
    assert document == json.loads(json.dumps(traced.document()))
    assert document["schema"] == "ogreg.exported.v1"
    assert document["input"]["shape"] == [None, 8, 32, 32, 3]
    assert document["input"]["dtype"] == "uint8"
    assert document["output"]["shape"] == [None, 5]
    assert document["checkpoint"]["labels"][2] == "größer"
    assert (document["checkpoint"]["mean"], document["checkpoint"]["std"]) == (
        list(MEAN),
        list(STD),
    )
    assert document["views"] == {"clips": 1, "crops": 3, "combined": "mean of scores"}
    assert document["weights"]["licence"] == "CC BY 4.0"
    assert len(document["weights"]["sha256"]) == 64
    # Any zip tool finds it; nobody's folders are in it.
    with zipfile.ZipFile(target) as archive:
        name = next(name for name in archive.namelist() if name.endswith("ogreg.json"))
        assert json.loads(archive.read(name)) == document
        assert "somebody" not in archive.read(name).decode()


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither in"):
        read_exported(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_exported(tmp_path / "none.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="is broken"):
        read_exported(tmp_path / "broken.pt2")
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "foreign.pt2")
    with pytest.raises(CheckpointError, match="was not exported by ogreg"):
        read_exported(tmp_path / "foreign.pt2")


# --- failures ----------------------------------------------------------------------------------


def test_a_program_that_computes_something_else_is_not_kept(traced: Traced, tmp_path: Path) -> None:
    """Its normalisation is that of the checkpoint, not of this description."""
    other = replace(traced, info=replace(traced.info, mean=(0.41, 0.5, 0.6)))
    with pytest.raises(WorkFailed, match="no file was written") as refused:
        other.write(tmp_path / "own.pt2", export.test_clips(traced.info, None))
    assert refused.value.where == "batch of 1"
    assert "allowed is" in refused.value.why
    assert os.listdir(tmp_path) == []


def test_agreement_is_of_logits_and_knows_what_is_no_number() -> None:
    logits = torch.tensor([[0.0, 5.0, -45.0], [1.0, 2.0, 3.0]])
    near = export._agreement(logits, logits + torch.tensor([0.0, 0.004, 0.0]))
    assert near.range == 50.0
    assert near.difference == pytest.approx(0.004, rel=1e-3)
    assert near.holds
    assert not export._agreement(logits, logits + torch.tensor([0.0, 0.006, 0.0])).holds
    assert not export._agreement(logits, logits * float("nan")).holds
    # Of scores a small one counts as a large one does.
    scores = logits.softmax(-1)
    wrong = scores.clone()
    wrong[0, 2] *= 1.02
    assert not export._agreement(export._log(scores), export._log(wrong)).holds


def test_a_model_that_torch_cannot_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ogreg.OGReG.forward

    def by_value(self: ogreg.OGReG, clip: Tensor) -> Tensor:
        return forward(self, clip) if clip.sum() > 0 else forward(self, -clip)

    monkeypatch.setattr(ogreg.OGReG, "forward", by_value)
    with pytest.raises(WorkFailed, match=r"torch\.export cannot follow ogreg-n") as refused:
        trace_checkpoint(saved(tmp_path), Choice(), ignore_progress)
    assert refused.value.fix.endswith("--batch 1")
    assert "\n" not in refused.value.why


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="ONNX needs onnx, onnxscript, onnxruntime") as gone:
        trace_checkpoint(saved(tmp_path), Choice("onnx"), ignore_progress)
    assert gone.value.fix == "pip install 'ogreg[onnx]'"
    (tmp_path / "own.onnx").touch()
    with pytest.raises(EnvironmentFault, match="ONNX needs onnxruntime"):
        read_exported(tmp_path / "own.onnx")


# --- ONNX --------------------------------------------------------------------------------------


@pytest.fixture
def onnx_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


@pytest.mark.slow
@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize(
    ("name", "size", "options"),
    [("ogreg-n", 32, FINE), ("swin3d-n", 64, {"token_selection": SELECTING})],
    ids=["ogreg-n", "swin3d-n-selecting"],
)
def test_onnx(tmp_path: Path, name: str, size: int, options: dict[str, Any]) -> None:
    import onnx
    import onnxruntime

    checkpoint, target = saved(tmp_path, name, size, **options), tmp_path / "own.onnx"
    heard: list[Progress | Note] = []
    traced = trace_checkpoint(checkpoint, Choice("onnx"), heard.append)
    assert [type(event) for event in heard] == [Note, Note]
    found = traced.write(target, export.test_clips(traced.info, None))
    assert [one.batch for one in found] == [1, 3]
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    [given], [made] = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == (
        "frames",
        "tensor(uint8)",
        ["batch", 8, size, size, 3],
    )
    assert (made.name, made.shape[1]) == ("scores", 5)
    frames = some_frames(5, size)
    [scores] = session.run(None, {"frames": frames.numpy()})
    expected = by_hand(checkpoint, frames).softmax(-1)
    torch.testing.assert_close(torch.from_numpy(scores), expected, atol=2e-5, rtol=1e-4)
    exported = read_exported(target)
    assert exported.info.labels[2] == "größer"
    torch.testing.assert_close(exported.open()(frames), expected, atol=2e-5, rtol=1e-4)
    model = onnx.load(target)
    onnx.checker.check_model(model)
    [entry] = [item for item in model.metadata_props if item.key == "ogreg.json"]
    assert json.loads(entry.value) == exported.document
    assert {"own.onnx", "model.safetensors"} >= set(os.listdir(tmp_path))


@pytest.mark.usefixtures("onnx_packages")
@pytest.mark.parametrize("descending", [True, False])
def test_stable_sort_in_onnx_keeps_the_order_of_equals(tmp_path: Path, descending: bool) -> None:
    import onnxruntime

    class Sort(torch.nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            return values.sort(dim=-1, descending=descending, stable=True).indices

    values = torch.randint(0, 3, (4, 20)).float()
    program = torch.export.export(Sort(), (values,))
    export_formats._write_onnx(program, tmp_path / "sort.onnx", "{}", ("values", "order"))
    session = onnxruntime.InferenceSession(
        tmp_path / "sort.onnx", providers=["CPUExecutionProvider"]
    )
    [order] = session.run(None, {"values": values.numpy()})
    assert torch.equal(torch.from_numpy(order), Sort()(values))
