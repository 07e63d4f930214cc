"""``ogreg export`` on the real command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ogreg_cli import export as command
from ogreg_cli.common import check_new_file
from ogreg_core.checkpoint import CheckpointInfo, load_model
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.errors import EnvironmentFault
from ogreg_core.export import read_exported
from ogreg_core.models.conversion import convert
from ogreg_core.models.registry import create_model
from tests.cli.test_errors import check
from tests.conftest import moving_frames

WITHOUT = """
import importlib.util, sys
proper = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.startswith("onnx") else proper(name, *rest)
sys.argv = ["ogreg", *{arguments!r}]
try:
    from ogreg_cli.__main__ import main
    main()
except SystemExit as stop:
    assert "torch" not in sys.modules
    raise
"""


INFO = CheckpointInfo(
    "ogreg-n",
    {"strides": [2, 1, 1, 1]},
    ["0", "1", "2", "3"],
    ClipSampling("uniform", 4),
    32,
    36,
    (0.4, 0.5, 0.6),
    (0.2, 0.3, 0.25),
    recipe="plain",
)


def test_a_converted_checkpoint_is_exported_and_scores_without_ogreg(ogreg, encode, tmp_path):
    torch.manual_seed(0)
    foreign = create_model("ogreg-n", 4, **INFO.options).state_dict()
    target = tmp_path / "own.safetensors"
    convert(foreign, INFO, target, source="plain.pth", again=lambda fit: "")
    encode("clip.mp4", moving_frames(20, 40, 60))
    done = ogreg(
        *("export", "own.safetensors", "--clip", "clip.mp4", "--batch", "2", "--json"),
        *("--licence", "CC BY 4.0"),
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.export.v1"
    assert document["format"] == "torch"
    assert document["clip"] == "clip.mp4"
    [agreement] = document["agreement"]
    assert agreement["batch"] == 2
    assert agreement["difference"] <= agreement["allowed"]
    target = tmp_path / "runs" / "export" / "plain" / "1" / "plain.pt2"
    assert document["path"] == str(target)
    assert document["size_bytes"] == target.stat().st_size
    assert document["weights"]["licence"] == "CC BY 4.0"
    assert document["input"]["shape"] == [2, 4, 32, 32, 3]
    assert read_exported(target).info.labels == ["0", "1", "2", "3"]
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(getattr(read_exported(target).info, key)) for key in ("mean", "std"))
    with torch.no_grad():
        clip = ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3)
        expected = load_model(tmp_path / "own.safetensors")[0](clip).softmax(-1)
    torch.testing.assert_close(torch.export.load(target).module()(frames), expected)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "own.bin"], 2, ["--to own.bin ends neither in .pt2 (torch) nor in .onnx"]),
        (
            ["--to", "own.onnx", "--format", "torch"],
            2,
            ["--to own.onnx is not a name for --format torch", "--to own.pt2"],
        ),
        (["--batch", "0"], 2, ["--batch 0 is neither a number from 1 nor dynamic"]),
        (["--batch", "any"], 2, ["--batch any is neither"]),
        (["--input", "video"], 2, ["frames", "clip"]),
        (["--to", "there.pt2"], 2, ["there.pt2 exists", "choose another --to"]),
        (["--to", "no/where.pt2"], 2, ["the folder no does not exist", "mkdir -p no"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_wrong_usage(ogreg, tmp_path, arguments, code, words):
    (tmp_path / "there.pt2").write_bytes(b"kept")
    check(ogreg("export", "own.safetensors", *arguments), code, *words)
    assert (tmp_path / "there.pt2").read_bytes() == b"kept"
    assert not (tmp_path / "runs").exists()


def test_missing_checkpoint(ogreg):
    check(ogreg("export", "none.safetensors"), 3, "none.safetensors does not exist")


def test_missing_packages_are_named_before_torch_is_loaded(tmp_path):
    arguments = ["export", "own.safetensors", "--to", "own.onnx", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(arguments=arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 4, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["what"] == "ONNX needs onnx, onnxscript, onnxruntime"
    assert error["fix"] == "pip install 'ogreg[onnx]'"


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Root may write everywhere: the answer is the system's."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    with pytest.raises(EnvironmentFault, match="no permission for"):
        check_new_file(tmp_path / "own.pt2", "--to")


def test_the_usual_target_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [command._usual_target(INFO, ".onnx") for _ in range(2)]
    assert found == [Path(f"runs/export/plain/{number}/plain.onnx") for number in (1, 2)]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("runs").write_text("in the way")
    with pytest.raises(EnvironmentFault) as refused:
        command._usual_target(INFO, ".onnx")
    assert refused.value.fix == "--to FILE.onnx"
