"""``ogreg profile``: what goes together, what is shown, and the examples of its help."""

from __future__ import annotations

import csv
import io
import json
import shlex

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from ogreg_cli import convert, profile, profile_show
from ogreg_cli.app import app
from ogreg_cli.common import read_options
from ogreg_cli.profile_arguments import names_in, numbers_in, sweep_in, views_in
from ogreg_core.checkpoint import CheckpointInfo, save_checkpoint
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.errors import OgregError, UsageError, VideoError
from ogreg_core.models.registry import MODELS, create_model, find_model
from ogreg_core.video import write_video
from tests.conftest import moving_frames

OPTIONS = {
    "stem": "patch",
    "token_selection": {"time": [{"before": 1, "ratio": 0.5}], "space": []},
}
QUICK = ["--repeats", "1", "--warmup", "1"]
TINY = ["--frames", "2", "--size", "32", "--classes", "5", *QUICK]


@pytest.fixture
def trained(tmp_path):
    """A run folder with a tiny model of three classes that selects tokens."""
    model = create_model("ogreg-n", 3, **OPTIONS)
    labels, statistics = ["clap", "wave", "sit"], (0.5, 0.5, 0.5)
    sampling = ClipSampling("uniform", 4)
    info = CheckpointInfo(
        *("ogreg-n", OPTIONS, labels, sampling, 32, 32, statistics, statistics), clips=2, crops=3
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save_checkpoint(tmp_path / "run/checkpoints/best.safetensors", model.state_dict(), info)
    return model


def in_process(*arguments):
    """The command without a process of its own: its result, or the error that it would tell."""
    return CliRunner().invoke(app, ["profile", *map(str, arguments)])


def rows_of(text):
    """Tables off a terminal: cells by tabulators, an empty line between two tables."""
    return [[line.split("\t") for line in part.splitlines()] for part in text.split("\n\n")]


def test_a_run_is_profiled_as_it_was_trained(trained, ogreg, tmp_path):
    write_video(tmp_path / "clip.mp4", moving_frames(8, 48, 64), 10)
    more = ["--clip", "clip.mp4", "--plot", "cost.png", "--batches", "1,2"]
    done = ogreg("profile", "-c", "run", *more, *QUICK, "--json")
    assert done.returncode == 0, done.stderr
    assert "picture: cost.png" in done.stderr
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.profile.v2"
    assert document["checkpoint"] == "run/checkpoints/best.safetensors"
    assert (document["model"], document["options"]) == ("ogreg-n", OPTIONS)
    assert (document["frames"], document["size_px"], document["classes"]) == (4, 32, 3)
    assert document["params"] == sum(parameter.numel() for parameter in trained.parameters())
    assert (document["views"], document["views_from"]) == (6, "as in its validation")
    assert document["gmacs_per_video"] == pytest.approx(6 * document["gmacs_per_view"])
    assert document["clip"]["path"] == "clip.mp4"
    assert document["clip"]["selections"] == [{"name": "time1", "kept_pct": 50.0}]
    assert len(document["clip"]["blocks"]) == 6
    overview, modules, throughput, gazes = profile_show.tables_of(document)
    rows = dict(overview.rows)
    assert rows["model"] == "ogreg-n, stem=patch, select=time:1:0.5"
    assert rows["input"] == "4x32x32, 3 classes"
    assert rows["views per video"] == "6 (2x3, as in its validation)"
    assert rows["left by selection time1"].startswith("50.0 %")
    assert modules.rows[-1][0] == "total"
    assert [row[0] for row in throughput.rows] == ["1", "2"]
    assert len(gazes.rows) == 6


def test_a_clip_that_cannot_be_read(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("none.mp4", "text.mp4"):
        error = in_process("-c", "run", "--clip", name).exception
        assert isinstance(error, VideoError)
        assert error.exit_code == 3
        assert name in error.what


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["-c", "run", "--model", "ogreg-n"], 2, ["--model does not go with --checkpoint"]),
        (["-c", "run", "--frames", "8", "--size", "64"], 2, ["--frames and --size do not go"]),
        (["-c", "run", "--select", "time:1:1"], 2, ["--select does not go with --checkpoint"]),
        (["-c", "run", "--compare", "all"], 2, ["--checkpoint does not go with --compare"]),
        (["-c", "run", "--sweep", "frames=2"], 2, ["--checkpoint does not go with --sweep"]),
        (["-c", "nowhere"], 3, ["nowhere does not exist"]),
        (["--clip", "x.mp4"], 2, ["--clip needs --checkpoint"]),
        (["--compare", "all", "--depth", "2"], 2, ["--depth does not go with --compare"]),
        (["--sweep", "frames=2", "--train"], 2, ["--train does not go with --sweep"]),
        (["--sweep", "frames=2", "--frames", "2"], 2, ["--frames does not go with --sweep frames"]),
        (["--sweep", "frmes=2"], 2, ["'frmes' cannot be swept", "did you mean 'frames'?"]),
        (["--json", "--format", "csv"], 2, ["--format does not go with --json"]),
        (["--compare", "ogret-t,s3", "--json"], 2, ["ogret-t: did you mean 'ogreg-t'?; s3: did"]),
        (["--batches", "1,x,0"], 2, ["'x', '0' are no number from 1 on", "--batches 1,4,8"]),
        (["--views", "4x2"], 2, ["CLIPSxCROPS", "--views 4x3"]),
        (["--plot", "x.gif"], 2, ["x.gif has no known ending of a picture", "--plot x.png"]),
        (["--plot", "none/x.png"], 2, ["the folder none does not exist", "mkdir"]),
        (["--plot", "run/there.png"], 2, ["exists already", "choose another --plot"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(arguments, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/there.png").touch()
    error = in_process(*arguments).exception
    assert isinstance(error, OgregError)
    assert error.exit_code == code
    for word in words:
        assert word in str(error)


def test_texts_become_values():
    assert names_in("all") == list(MODELS)
    assert names_in("s3d, ogreg-n,s3d") == ["s3d", "ogreg-n"]
    assert numbers_in("--batches", "4, 1,4", "") == (4, 1)
    assert views_in("10x3") == (10, 3)
    assert sweep_in("size=64,32") == ("size", (64, 32))
    for text in ("frames", "frames=", "size=16", "frames=2;4"):
        with pytest.raises(UsageError) as caught:
            sweep_in(text)
        assert caught.value.fix.startswith("--sweep ")
        sweep_in(caught.value.fix.split()[1])


def test_tables_of_one_model():
    done = in_process(
        *("--model", "ogreg-n", *TINY, "--batches", "1", "--views", "4x3", "--train"),
        *("--depth", "2", "--operators", "2", "--dtype", "bf16"),
    )
    assert done.exit_code == 0, done.output
    overview, modules, throughput, operators = rows_of(done.stdout)
    figures = dict(overview)
    assert figures["views per video"] == "12 (4x3, --views)"
    assert "one multiply-add counts once" in figures["counted so"]
    assert "difference 0.00 %" in figures["torch's counter"]
    assert "forward, backward, AdamW" in figures["training step, batch 1"]
    assert figures["device"].startswith("cpu, bf16, ")
    names = [row[0] for row in modules]
    assert {"stem", "stages.0", "stages.0.0", "total"} < set(names)
    assert len(throughput) == 2
    assert len(operators) == 3


@pytest.fixture(scope="module")
def comparison():
    """The document of two models, one of which does not take its input."""
    done = in_process("--compare", "ogreg-n,s3d", *TINY, "--batches", "1,2", "--train", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_tables_of_several_models(comparison, capsys):
    profile_show.show(comparison, "table")
    costs, throughput, training, left_out = rows_of(capsys.readouterr().out)
    assert costs[0][-1] == "times ogreg-n"
    assert (costs[1][0], costs[1][1], costs[1][-1]) == ("ogreg-n", "2x32x32", "1.00")
    assert throughput[0][:4] == ["model", "1", "2", "best batch"]
    assert training[1][0] == "ogreg-n"
    assert left_out[1][0] == "s3d"


def test_other_formats(comparison, capsys):
    profile_show.show(comparison, "markdown")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| model | input | params (M) |")
    assert lines[3].startswith("| --- | --- | --: |")
    profile_show.show(comparison, "csv")
    first, second = csv.DictReader(io.StringIO(capsys.readouterr().out))
    row = comparison["models"][0]
    assert float(first["latency_ms_p50"]) == row["latency_ms_p50"]
    assert float(first["clips_per_s_batch_2"]) == row["throughput"][1]["clips_per_s"]
    assert (second["model"], second["error"]) == ("s3d", comparison["left_out"][0]["error"])


def test_a_sweep_with_a_value_that_a_model_does_not_take(capsys):
    size = ["--size", "32", "--classes", "5", *QUICK]
    done = in_process("--compare", "ogreg-n,s3d", "--sweep", "frames=2,5", *size, "--json")
    document = json.loads(done.stdout)
    assert [model["model"] for model in document["models"]] == ["ogreg-n", "s3d"]
    profile_show.show(document, "table")
    points, left_out = rows_of(capsys.readouterr().out)
    assert [row[:2] for row in points[1:]] == [
        *(["ogreg-n", "2"], ["ogreg-n", "5"], ["s3d", "2"], ["s3d", "5"]),
    ]
    assert points[3][2:] == ["–"] * 6
    assert left_out[1] == ["s3d", "2", "its poolings leave nothing of less than 5"]
    profile_show.show(document, "csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert (rows[0]["model"], rows[0]["value"]) == ("ogreg-n", "2")
    assert rows[2]["error"] == left_out[1][2]


def one_model(**changes):
    """A document with invented figures."""
    check = {"torch_gmacs": 1.9, "difference_pct": 0.0, "note": None}
    document = {
        "schema": "ogreg.profile.v2",
        **{"model": "ogreg-n", "options": {}, "checkpoint": None, "frames": 8, "size_px": 112},
        **{"classes": 400, "device": "cpu", "dtype": "float32", "compiled": False, "threads": 1},
        **{"params": 10**6, "gmacs_per_view": 2.0, "gflops_per_view": 4.0, "views": 1},
        **{"views_protocol": "1x1", "views_from": None, "gmacs_per_video": 2.0},
        **{"gflops_per_video": 4.0, "products_gmacs": 1.9, "counter_check": check},
        **{"attention_gmacs": 0.5, "attention_check_gmacs": 0.5, "activations_m": 2.0},
        **{"uncounted_operators": {}, "modules": [], "operators": [], "clip": None},
        "latency": {"ms_p50": 2.0, "ms_p90": 3.0, "repeats": 5, "warmup": 2, "compile_s": None},
        "throughput": [{"batch": 64, "error": "out of memory"}],
        **{"peak_memory_is": "allocated", "training": None, "training_error": None},
        "matrix_product_share_pct": 70.0,
    }
    return document | changes


def test_what_a_reader_must_know():
    assert list(profile_show.notes_on(one_model())) == []
    apart = {"torch_gmacs": 1.85, "difference_pct": 2.7, "note": "not without data: x"}
    document = one_model(counter_check=apart, training_error="out of memory: x")
    warning, training = profile_show.notes_on(document)
    assert warning == (
        "warning: fvcore counts 1.9 G in matrix products and convolutions, torch 1.85 G"
    )
    assert training == "training step: out of memory: x"
    rows = dict(profile_show.tables_of(document)[0].rows)
    assert "difference 2.70 %, not without data: x" in rows["torch's counter"]
    assert rows["training step"] == "out of memory: x"
    assert "norms and interpolation are 5.0 %" in rows["counted so"]
    assert rows["activations per view"].endswith("7.629 MB in float32")


def test_rows_without_room_and_what_was_not_counted():
    document = one_model(uncounted_operators={"aten::fft": 3})
    overview, _, throughput = profile_show.tables_of(document)
    assert dict(overview.rows)["not counted"] == "aten::fft x3"
    assert throughput.rows == [["64", "out of memory", "–", "–", "–"]]


def test_modules_are_indented_for_a_person():
    part = {"type": "Linear", "params": 1, "gmacs": 1.0, "activations_m": 1.0}
    names = [("stem", 1), ("stages.0", 1), ("stages.0.0", 2), ("stages.0.0.mlp", 3), ("head", 1)]
    modules = [{"name": name, "depth": depth, **part} for name, depth in names]
    document = one_model(modules=modules)
    _, table, _ = profile_show.tables_of(document, indented=True)
    shown = [row[0] for row in table.rows]
    assert shown == ["stem", "stages.0", "  .0", "    .mlp", "head", "total"]
    _, table, _ = profile_show.tables_of(document)
    assert [row[0] for row in table.rows] == [*(name for name, _ in names), "total"]


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
