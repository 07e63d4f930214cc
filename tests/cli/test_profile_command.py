"""``ogreg profile`` of what was trained, and the examples of its help."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
import typer.main

from ogreg_cli import convert, profile
from ogreg_cli.app import app
from ogreg_cli.common import option_words, read_options
from ogreg_core.checkpoint import CheckpointInfo, save_checkpoint
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.models.registry import create_model, find_model
from tests.cli.test_errors import check

OPTIONS = {
    "stem": "patch",
    "token_selection": {"time": [{"before": 1, "ratio": 0.5}], "space": []},
}


@pytest.fixture
def trained(tmp_path):
    """A run folder with a tiny model of three classes that selects tokens."""
    model = create_model("ogreg-n", 3, **OPTIONS)
    labels, statistics = ["clap", "wave", "sit"], (0.5, 0.5, 0.5)
    sampling = ClipSampling("uniform", 4)
    info = CheckpointInfo("ogreg-n", OPTIONS, labels, sampling, 32, 32, statistics, statistics)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_checkpoint(tmp_path / "run/checkpoints/best.safetensors", model.state_dict(), info)
    return model


def test_a_run_is_profiled_as_it_was_trained(trained, ogreg, capsys):
    done = ogreg("profile", "-c", "run", "--batch", "1", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["checkpoint"] == "run/checkpoints/best.safetensors"
    assert (document["model"], document["options"]) == ("ogreg-n", OPTIONS)
    assert (document["frames"], document["size_px"], document["classes"]) == (4, 32, 3)
    assert document["params"] == sum(parameter.numel() for parameter in trained.parameters())
    profile._show(document)
    rows = dict(line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert rows["model"] == "ogreg-n, stem=patch, select=time:1:0.5"
    assert rows["input"] == "4x32x32, 3 classes"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-c", "run", "--model", "ogreg-n"], 2, ["--model does not go with --checkpoint"]),
        (["-c", "run", "--frames", "8"], 2, ["--frames does not go with --checkpoint"]),
        (["-c", "run", "--select", "time:1:1"], 2, ["--select does not go with --checkpoint"]),
        (["-c", "run", "--compare", "all"], 2, ["--checkpoint does not go with --compare"]),
        (["-c", "nowhere"], 3, ["nowhere does not exist"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(arguments, code, words, ogreg):
    check(ogreg("profile", *arguments), code, *words)


def test_options_for_the_eye():
    options = {"window": 16, "gta": {"stages": [3], "options": {"regions": 0}}}
    assert list(option_words(options)) == ["window=16", "gta after stage 3 (regions=0)"]


EXAMPLES = [
    example
    for module in (convert, profile)
    for example in module.EXAMPLES.removeprefix("Examples: ").split(" | ")
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_would_run(example):
    program, name, *arguments = shlex.split(example)
    assert program == "ogreg"
    # Refuses options that do not exist.
    params = typer.main.get_command(app).commands[name].make_context(name, arguments).params
    options = read_options(params["model"], params["option"], params["select"])
    for other in (params.get("compare") or params["model"]).split(","):
        find_model(other)
    if name == "convert":
        convert.settle_test(params)
    # Selection in a place that there is, and options that go together.
    with torch.device("meta"):
        create_model(params["model"], 5, **options)
