"""``ogreg convert`` and ``ogreg models`` on the real command line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import typer.main
from torchvision.models import get_model_weights

from ogreg_cli.app import app
from ogreg_cli.convert import PUBLISHED, _again, settle_test
from ogreg_core.checkpoint import load_model
from ogreg_core.errors import UsageError
from ogreg_core.models.conversion import Fit
from ogreg_core.models.registry import MODELS, create_model
from ogreg_core.recipe import load_recipe
from tests.cli.test_errors import check
from tests.cli.test_start_up import PROBE


@pytest.fixture
def foreign(tmp_path):
    """Plain weights of a tiny model with four classes."""
    torch.manual_seed(0)
    model = create_model("ogreg-n", 4).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "plain.pth")
    (tmp_path / "labels.txt").write_text("clap\nwave\njump\nsit\n")
    return model


ARGUMENTS = ["convert", "plain.pth", "--model", "ogreg-n", "--to", "own.safetensors"]


def test_plain_weights_become_a_checkpoint_that_predicts(foreign, ogreg, tmp_path):
    done = ogreg(
        *ARGUMENTS,
        *("--labels", "labels.txt", "--frames", "4", "--stride", "3", "--size", "32", "--json"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.convert.v1"
    assert document["classes"] == 4
    assert document["tensors"] == len(foreign.state_dict())
    assert document["labels_from"] == "labels.txt"
    assert document["protocol"] == "4x3, 1x1 views, short side 37, crop 32"
    assert document["assumed"] == ["sampling", "fps", "short", "short_side", "clips", "crops"]
    model, info = load_model(tmp_path / "own.safetensors")
    assert info.labels == ["clap", "wave", "jump", "sit"]
    assert (info.sampling.frames, info.sampling.stride, info.size) == (4, 3, 32)
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(clip), foreign(clip))


def test_table_names_what_was_assumed(foreign, ogreg, tmp_path):
    done = ogreg(*ARGUMENTS, "--sampling", "uniform")
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("\t") for line in done.stdout.splitlines())
    assert rows["classes"] == "4, names: none given: numbers"
    assert rows["protocol"] == "8 uniform, 1x1 views, short side 128, crop 112"
    assert rows["of which assumed"] == "frames, size, short-side, clips, crops"
    assert rows["left out"] == "nothing"
    assert load_model(tmp_path / "own.safetensors")[1].labels == ["0", "1", "2", "3"]
    check(ogreg(*ARGUMENTS), 2, "own.safetensors exists", "choose another --to")


def test_the_nearest_match_as_a_command_that_runs(foreign, ogreg, tmp_path):
    arguments = [word.replace("ogreg-n", "ogreg-t") for word in ARGUMENTS]
    done = ogreg(*arguments, "--labels", "labels.txt", "--frames", "4")
    check(done, 3, "plain.pth does not hold the weights of ogreg-t", "nearest match: ogreg-n")
    fix = next(line for line in done.stderr.splitlines() if line.startswith("  fix"))
    command = shlex.split(fix.removeprefix("  fix"))
    assert command[:2] == ["ogreg", "convert"]
    assert command[-2:] == ["--model", "ogreg-n"]
    again = ogreg(*command[1:])
    assert again.returncode == 0, again.stderr
    info = load_model(tmp_path / "own.safetensors")[1]
    assert (info.model, info.sampling.frames, info.labels[0]) == ("ogreg-n", 4, "clap")


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"ogreg-n": "ogreg_n"}, 2, ["did you mean 'ogreg-n'"]),
        ({"own.safetensors": "own.pth"}, 2, ["does not end in .safetensors"]),
        ({"own.safetensors": "no where/own.safetensors"}, 2, ["mkdir -p 'no where'"]),
        ({"plain.pth": "none.pth"}, 3, ["none.pth does not exist"]),
        ({"plain.pth": "swin3d_x"}, 2, ["no starting weights called 'swin3d_x'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(changes, code, words, foreign, ogreg, tmp_path):
    before = sorted(tmp_path.iterdir())
    check(ogreg(*(changes.get(word, word) for word in ARGUMENTS)), code, *words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--crops", "2"], 2, ["--crops"]),
        (["--sampling", "uniform", "--stride", "2"], 2, ["--sampling dense"]),
        (["--short-side", "64"], 2, ["--short-side 64"]),
        (["--option", "stm=patch"], 2, ["stm"]),
        (["--labels", "nowhere"], 3, ["no class names in 'nowhere'"]),
        (["--labels", "kinetics400"], 3, ["4 classes", "400 labels", "--init-from plain.pth"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_does_not_go_together(more, code, words, foreign, ogreg, tmp_path):
    check(ogreg(*ARGUMENTS, *more), code, *words)
    assert not (tmp_path / "own.safetensors").exists()


@pytest.mark.parametrize(
    "arguments",
    [["convert", "--help"], ["convert", "x.pth"], [*ARGUMENTS[:-1], "x.pth"], ["models", "--json"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments, tmp_path):
    code = PROBE.format(arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_help_ends_with_examples(ogreg):
    assert "Examples: ogreg convert swin3d_t --model swin3d-t" in ogreg("convert", "--help").stdout


class Code:
    """Something that unpickling would run."""

    def __reduce__(self):
        return print, ("code was run",)


def test_pickled_code_is_refused(ogreg, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": Code()}, tmp_path / "plain.pth")
    done = ogreg(*ARGUMENTS, "--json")
    check(done, 3, "loading it could run code")
    assert "code was run" not in done.stdout + done.stderr
    assert json.loads(done.stdout)["error"]["code"] == 3


def test_models_tell_weights_and_source(ogreg):
    document = json.loads(ogreg("models", "--json").stdout)
    assert [row["name"] for row in document["models"]] == list(MODELS)
    for row in document["models"]:
        known = MODELS[row["name"]]
        assert row["weights"] == list(known.weights)
        assert row["mean"] == list(known.mean)
        assert (row["params_m"], row["source"]) == (known.params_m, known.source)
    header, *rows = (line.split("\t") for line in ogreg("models").stdout.splitlines())
    assert header[3] == "GFLOPs (multiply-adds)"
    assert [row[0] for row in rows] == list(MODELS)
    assert all(row[5] == ", ".join(MODELS[row[0]].weights) for row in rows)


SETTINGS = ("sampling", "frames", "stride", "fps", "short", "size", "short_side", "clips", "crops")


def settled(model, **typed):
    return settle_test({**dict.fromkeys(SETTINGS), **typed, "model": model})


@pytest.mark.parametrize(
    "model", ["swin3d-t", "swin3d-s", "swin3d-b", "mvit-v1-b", "mvit-v2-s", "r2plus1d-18", "s3d"]
)
def test_protocol_is_the_one_that_torchvision_states(model):
    for weights in get_model_weights(model.replace("-", "_")):
        stated = dict(re.findall(r"`(\w+)=([\d.]+)`", weights.meta["_docs"]))
        test = settled(model)
        assert test["frames"] == int(stated.get("clip_len", 16))
        # Nominal: Kinetics has 30 frames per second.
        assert (test["fps"] or 30) / test["stride"] == float(stated.get("frame_rate", 7.5))
        assert test["clips"] * test["crops"] == int(stated.get("clips_per_video", 5))
        preset = weights.transforms()
        assert test["size"] == preset.crop_size[0]
        if not model.startswith("swin3d"):
            assert test["short_side"] == preset.resize_size[0]


@pytest.mark.parametrize("model", [name for name in PUBLISHED if name != "s3d"])
def test_protocol_is_that_of_the_published_recipe(model):
    recipe = load_recipe(f"kinetics400-{model}").recipe
    test = settled(model)
    for name in SETTINGS[:7]:
        # A recipe leaves the stride of uniform frames at its default.
        if name != "stride" or recipe.data.sampling == "dense":
            assert test[name] == getattr(recipe.data, name), name
    assert (test["clips"], test["crops"]) == (recipe.eval.clips, recipe.eval.crops)


def test_what_is_typed_wins():
    test = settled("swin3d-t", clips=1, size=112, fps=25.0)
    assert (test["clips"], test["crops"], test["short_side"], test["fps"]) == (1, 3, 112, 25)
    assert settled("ogreg-t") == {
        **{"sampling": "dense", "frames": 32, "stride": 2, "fps": 0, "short": "loop"},
        **{"size": 224, "short_side": 256, "clips": 1, "crops": 1},
    }
    with pytest.raises(UsageError, match="--sampling dense"):
        settled("video-focalnet-t", stride=4)


SELECT = ["--select", "time:1:0.5", "--select", "space:2:0.7367"]


def test_token_selection_goes_into_the_checkpoint(ogreg, tmp_path):
    selection = {
        "time": [{"before": 1, "ratio": 0.5}],
        "space": [{"before": 2, "ratio": 0.7367}],
    }
    foreign = create_model("ogreg-n", 4, token_selection=selection).eval()
    torch.save(foreign.state_dict(), tmp_path / "plain.pth")
    done = ogreg(*ARGUMENTS, *SELECT)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("\t") for line in done.stdout.splitlines())
    assert rows["model"] == "ogreg-n, select=time:1:0.5 space:2:0.7367"
    assert rows["assumed from"] == "what is usual"
    model, info = load_model(tmp_path / "own.safetensors")
    assert info.options["token_selection"]["space"] == selection["space"]
    clip = torch.randn(1, 3, 8, 112, 112)
    with torch.no_grad():
        assert torch.equal(model(clip), foreign(clip))


def test_the_command_that_would_fit_has_a_selection_only_where_weights_have_it(foreign, ogreg):
    arguments = [word.replace("ogreg-n", "ogreg-t") for word in ARGUMENTS]
    done = ogreg(*arguments, *SELECT, "--clips", "2")
    check(done, 3, "--clips 2 --model ogreg-n")
    fix = next(line for line in done.stderr.splitlines() if line.startswith("  fix"))
    assert "--select" not in fix
    assert ogreg(*shlex.split(fix.removeprefix("  fix"))[1:]).returncode == 0


def parsed(arguments):
    """The context of a command line that is not run; refuses options that do not exist."""
    command = typer.main.get_command(app).commands[arguments[0]]
    return command.make_context(arguments[0], list(arguments[1:]))


def test_options_are_repeated_one_by_one():
    ctx = parsed([*ARGUMENTS, *SELECT, "--option", "stem=patch", "--sampling", "uniform"])
    keep = {"time": [{"before": 1, "ratio": 0.5}, {"before": 3, "ratio": 0.25}], "space": []}
    fit = Fit("swin3d-b", {"window": 16, "token_selection": keep})
    assert _again(ctx, fit, "ogreg-n", {}) == (
        "ogreg convert plain.pth --to own.safetensors --sampling uniform --model swin3d-b "
        "--option window=16 --select time:1:0.5 --select time:3:0.25"
    )
