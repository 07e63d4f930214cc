"""Reading a study."""

from __future__ import annotations

import pytest

from ogreg_core.errors import UsageError
from ogreg_core.evidence.study import Study, builtin_studies, load_study

HEAD = """
title = "t"
recipe = "base.toml"
clips = 40
seeds = [0, 1]
reference = "a"
[tuning]
lrs = [1e-3]
clips = 20
"""
ROW = '[[rows]]\nname = "a"\nchanges = ["model.name=ogreg-n"]\n'


@pytest.fixture
def write(tmp_path):
    (tmp_path / "base.toml").write_text("[train]\nbatch_size = 8\n")

    def study(text):
        path = tmp_path / "own.toml"
        path.write_text(text)
        return str(path)

    return study


def test_a_study_names_its_recipe_relative_to_itself(write, tmp_path):
    name, recipe, study = load_study(write(HEAD + ROW))
    assert (name, recipe) == ("own", tmp_path / "base.toml")
    assert study.row("a").changes == ["model.name=ogreg-n"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + ROW + ROW, "called the same: a"),
        (HEAD.replace('reference = "a"', 'reference = "b"') + ROW, "no row 'b'"),
        (HEAD + ROW.replace('"a"', '"a, b"'), "commas stand between"),
        (HEAD + ROW + 'lr_of = "c"\n', "no row 'c'"),
        (HEAD + ROW + 'lr = 0.1\nlr_of = "a"\n', "both lr and lr_of"),
        (HEAD.replace("seeds = [0, 1]", "seeds = [100]") + ROW, "seed 100 is the tuning's"),
        (HEAD + ROW.replace("model.name=ogreg-n", "train.lr=1"), "changes train.lr"),
        (HEAD + ROW.replace("model.name=ogreg-n", "data={frames=8}"), "changes data.frames"),
        (HEAD.replace("seeds = [0, 1]", "seeds = [0, 0]") + ROW, "a seed stands twice"),
        (HEAD.replace("clips = 20", "clips = 20\nheld_out = 1.0") + ROW, "tuning.held_out"),
        (HEAD + ROW.replace("model.name=ogreg-n", "data.size=64"), "changes data.size"),
        (HEAD + ROW.replace("ogreg-n", "ogreg-x"), "row 'a'"),
        (HEAD + ROW.replace("[[rows]]", "[[rows]]\nheight = 3"), "rows.0.height"),
        (HEAD.replace("lrs = [1e-3]", "lrs = []") + ROW, "tuning.lrs"),
        ("title =", "cannot be read"),
    ],
)
def test_what_is_not_fair_or_not_known_is_refused_by_name(write, text, words):
    with pytest.raises(UsageError) as caught:
        load_study(write(text))
    assert words in str(caught.value) + caught.value.why
    assert caught.value.fix


def test_a_name_that_is_no_study_is_refused_with_those_there_are():
    with pytest.raises(UsageError) as caught:
        load_study("modles")
    assert "models" in caught.value.why


@pytest.mark.parametrize("name", builtin_studies())
def test_the_built_in_studies_are_whole(name):
    _, recipe, study = load_study(name)
    assert recipe.is_file()
    assert len(study.seeds) >= 3
    assert any(row.name == study.reference for row in study.rows)


@pytest.mark.parametrize(
    ("videos", "batch", "clips", "epochs"), [(100, 10, 400, 4), (227, 8, 4000, 18), (5, 8, 3, 1)]
)
def test_the_budget_is_met_to_the_nearest_epoch(videos, batch, clips, epochs):
    assert Study.epochs(videos, batch, clips) == epochs
