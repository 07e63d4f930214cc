"""``ogreg prepare demo --hard``, and the recipes that name what it makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ogreg_cli import train
from ogreg_core.datasets import demo
from ogreg_core.errors import DataError
from ogreg_core.recipe import load_recipe
from tests.cli.test_errors import check


@pytest.mark.slow
def test_from_the_command_to_the_recipe(ogreg, tmp_path):
    few = ("--train-clips", "1", "--val-clips", "1", "--workers", "2")
    done = ogreg("prepare", "demo", "d", "--hard", *few)
    assert done.returncode == 0, done.stderr
    assert "train\t24\t24\t24\t100.0 %" in done.stdout
    assert f"data.dataset=demo-hard data.root={tmp_path / 'd'}" in done.stderr
    about = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert (about["dataset"], about["classes"], about["videos"]["val"]) == ("demo-hard", 24, 24)
    check(ogreg("prepare", "demo", "d", *few), 3, "holds the harder demo", "d-plain")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prepare", "folder", ".", "--hard"], 2, ["--hard cannot be used with folder"]),
        (
            ["data", "show", "demo", "data.dataset=demo-hard", "data.root=d h"],
            3,
            ["ogreg prepare demo 'd h' --hard"],
        ),
    ],
)
def test_refusals(ogreg, arguments, code, words):
    check(ogreg(*arguments), code, *words)


@pytest.mark.parametrize("name", ["demo", "demo-hard"])
def test_train_renders_the_one_that_the_recipe_names(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        demo, "prepare_demo", lambda root, *, hard, **_: asked.append((Path(root), hard))
    )
    loaded = load_recipe("demo", [f"data.dataset={name}", f"data.root={tmp_path / 'd'}"])
    train._render_demo_if_missing(loaded)
    assert asked == [(tmp_path / "d", name == "demo-hard")]


def test_train_does_not_take_the_plain_one_for_the_harder(demo_root):
    loaded = load_recipe("demo", ["data.dataset=demo-hard", f"data.root={demo_root}"])
    with pytest.raises(DataError, match="plain demo data set, not demo-hard") as error:
        train._render_demo_if_missing(loaded)
    assert f"data.root={demo_root}-hard" in error.value.fix
