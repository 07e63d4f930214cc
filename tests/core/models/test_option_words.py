from __future__ import annotations

from ogreg_core.models.conversion import Fit
from ogreg_core.models.option_words import model_words, option_words

SELECTION = {
    "time": [{"before": 1, "ratio": 0.5}],
    "space": [],
    "sigma": 0.1,
    "gradient": "unbiased",
}


def test_token_selection_reads_as_it_is_typed():
    assert list(option_words({"token_selection": SELECTION})) == ["select=time:1:0.5"]
    more = {**SELECTION, "space": [{"before": 2, "ratio": 0.7367}, {"before": 3, "ratio": 1.0}]}
    words = ["select=time:1:0.5 space:2:0.7367 space:3:1"]
    assert list(option_words({"token_selection": more})) == words


def test_other_options():
    gta = {"stages": [3], "options": {"regions": 0}}
    assert list(option_words({"window": 16, "gta": gta})) == [
        "window=16",
        "gta after stage 3 (regions=0)",
    ]
    assert list(option_words({"gta": {"stages": [2, 3], "options": {}}})) == [
        "gta after stage 2, 3"
    ]
    assert list(option_words({"strides": [4, 2, 1, 1]})) == ["strides=4-2-1-1"]


def test_the_same_words_wherever_a_model_is_named():
    assert model_words("ogreg-n", {}) == "ogreg-n"
    options = {"stem": "patch", "token_selection": SELECTION}
    assert Fit("ogreg-n", options).name() == "ogreg-n, stem=patch, select=time:1:0.5"
