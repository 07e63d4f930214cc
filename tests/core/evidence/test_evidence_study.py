"""Reading a study."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ogreg_core.errors import UsageError
from ogreg_core.evidence.study import Study, Tuning, best_rate, builtin_studies, load_study

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
        (HEAD + ROW + ROW.replace('"a"', '"b"') + 'against = "c"\n', "'b' is against 'c'"),
        (HEAD + ROW + ROW.replace('"a"', '"b"') + 'against = "b"\n', "'b' is against 'b'"),
        (HEAD + ROW + ROW.replace('"a"', '"b"') + 'against = "a"\n', "are against the reference"),
        (HEAD.replace("seeds = [0, 1]", "seeds = [100]") + ROW, "seed 100 is the tuning's"),
        (HEAD + ROW.replace("model.name=ogreg-n", "train.lr=1"), "changes train.lr"),
        (HEAD + ROW.replace("model.name=ogreg-n", "data={frames=8}"), "changes data.frames"),
        (HEAD.replace("seeds = [0, 1]", "seeds = [0, 0]") + ROW, "a seed stands twice"),
        (HEAD.replace("clips = 20", "clips = 20\nheld_out = 1.0") + ROW, "tuning.held_out"),
        (HEAD + ROW.replace("model.name=ogreg-n", "data.size=64"), "changes data.size"),
        (HEAD + ROW.replace("model.name=ogreg-n", "train.ema=0.9"), "changes train.ema"),
        (HEAD + ROW.replace("ogreg-n", "ogreg-x"), "row 'a'"),
        (
            HEAD.replace("clips = 40", 'clips = 40\njudged = ["half"]') + ROW,
            "not all among the controls",
        ),
        (HEAD + ROW.replace("[[rows]]", "[[rows]]\nheight = 3"), "rows.0.height"),
        (HEAD.replace("lrs = [1e-3]", "lrs = []") + ROW, "tuning.lrs"),
        (HEAD.replace("lrs = [1e-3]", "lrs = [1e-3, 1e-3]") + ROW, "stands twice in lrs"),
        (
            HEAD.replace("lrs = [1e-3]", "lrs = [1.0, 2.0, 3.0]\nfirst = [1.0, 3.0]") + ROW,
            "not neighbours in lrs",
        ),
        (HEAD.replace("lrs = [1e-3]", "lrs = [1e-3]\nfirst = [1e-4]") + ROW, "not neighbours"),
        ("title =", "cannot be read"),
    ],
)
def test_what_is_not_fair_or_not_known_is_refused_by_name(write, text, words):
    with pytest.raises(UsageError) as caught:
        load_study(write(text))
    assert words in str(caught.value) + caught.value.why
    assert caught.value.fix


@given(data=st.data())
def test_the_search_ends_at_a_rate_that_is_better_than_its_neighbours(data):
    """However the scores lie, and whatever of it is known before: asked one by one as a study would."""
    count = data.draw(st.integers(1, 6))
    score = st.none() | st.tuples(st.integers(0, 3).map(float), st.just(0.0))
    truth = {float(n): data.draw(score) for n in range(1, count + 1)}
    low = data.draw(st.integers(1, count))
    high = data.draw(st.integers(low, count))
    chance = data.draw(st.integers(-1, 3))
    tuning = Tuning(lrs=[*truth], first=[float(n) for n in range(low, high + 1)], clips=1)
    known = {lr: truth[lr] for lr in data.draw(st.sets(st.sampled_from([*truth])))}

    tried = {}
    at_chance = {lr for lr, found in truth.items() if found and found[0] <= chance}
    while missing := [lr for lr in tuning.reached(tried, at_chance) if lr not in tried]:
        tried[missing[0]] = truth[missing[0]]
    found = tuning.reached(tried, at_chance)
    assert set(tuning.first) <= set(found) == set(tried)
    # Results of another study change nothing.
    assert tuning.reached({**known, **tried}, at_chance) == found

    best = best_rate(tried)
    if best is None or best in at_chance:
        assert found == [*truth]
    if best is None:
        return
    for neighbour in (best - 1, best + 1):
        if neighbour in truth:
            assert neighbour in tried
            assert truth[neighbour] is None or truth[neighbour] <= truth[best]


def test_without_first_the_whole_grid_is_tried():
    tuning = Tuning(lrs=[4.0, 1.0, 2.0], clips=1)
    assert tuning.reached({}) == [1.0, 2.0, 4.0]


def test_a_name_that_is_no_study_is_refused_with_those_there_are():
    with pytest.raises(UsageError) as caught:
        load_study("modles")
    assert "models" in caught.value.why


@pytest.mark.parametrize("name", builtin_studies())
def test_the_built_in_studies_are_whole(name):
    _, recipe, study = load_study(name)
    assert recipe.is_file()
    # What shows that something can be learnt at all needs one.
    assert len(study.seeds) >= (1 if name == "budget" else 3)
    assert any(row.name == study.reference for row in study.rows)


@pytest.mark.parametrize(
    ("videos", "batch", "clips", "epochs"), [(100, 10, 400, 4), (227, 8, 4000, 18), (5, 8, 3, 1)]
)
def test_the_budget_is_met_to_the_nearest_epoch(videos, batch, clips, epochs):
    assert Study.epochs(videos, batch, clips) == epochs
