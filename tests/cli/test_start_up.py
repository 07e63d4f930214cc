"""Help, version and usage errors never load torch, and every command has help with examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ogreg_core import __version__

COMMANDS = [
    *("prepare", "train", "eval", "profile", "predict", "visualize-gaze", "models"),
    *("compare", "fuse", "runs", "report", "convert"),
]
QUICK = [
    ["--help"],
    ["--version"],
    [],
    ["trian"],
    *([command, "--help"] for command in COMMANDS),
    ["train"],
    ["data", "show", "--help"],
    ["prepare", "ssv2", "x", "--shard", "3/2"],
    ["train", "--nonsense"],
    ["train", "demo", "train.lrr=1"],
    ["train", "demo", "--print-recipe"],
    ["train", "demo", "--gpus", "0"],
    ["train", "demo", "--print-groups", "--gpus", "2"],
    ["train", "nope.toml"],
    ["predict"],
    ["predict", "none.mp4"],
    ["profile", "--model", "x"],
    ["prepare", "kinetcs", "x"],
    ["models"],
]
PROBE = """
import sys
sys.argv = ["ogreg", *{arguments!r}]
try:
    from ogreg_cli.__main__ import main
    main()
except SystemExit:
    pass
heavy = sorted({{"torch", "torchvision", "numpy", "decord", "av"}} & set(sys.modules))
sys.exit(f"imported {{heavy}}" if heavy else 0)
"""


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_nothing_heavy_is_imported(arguments, tmp_path):
    code = PROBE.format(arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_version_and_both_ways_to_start(ogreg):
    assert ogreg("--version").stdout == f"ogreg {__version__}\n"
    script = Path(sys.executable).with_name("ogreg")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ogreg {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples(command, ogreg):
    done = ogreg(command, "--help")
    assert done.returncode == 0
    assert "Examples: ogreg" in done.stdout
    assert done.stderr == ""
