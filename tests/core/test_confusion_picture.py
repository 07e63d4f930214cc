"""The confusion picture: readable with few and with many classes, the same in a file and as pixels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from ogreg_core.confusion_picture import (
    _name,
    confusion_pixels,
    most_confused,
    save_confusion,
)


def picture(classes, row, column):
    """Ten videos of each class: all right, but for one of ``row`` taken for ``column``."""
    matrix = np.diag(np.full(classes, 10))
    matrix[row, row] -= 1
    matrix[row, column] += 1
    return confusion_pixels(matrix, [f"class {number:03d}" for number in range(classes)])


def runs(places):
    """(first, length) of each run of neighbours."""
    parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [(int(part[0]), len(part)) for part in parts]


@pytest.mark.parametrize("classes", [5, 16, 48, 174, 400])
def test_cells_are_whole_pixels_in_their_places(classes):
    """Another prediction for one video changes two cells, whose size and places are known."""
    cell = max(2, min(90, 840 // classes))
    tops = []
    for row in (1, classes - 2):
        first, second = picture(classes, row, 0), picture(classes, row, classes - 1)
        assert first.shape == second.shape
        changed = (first != second).any(axis=2)
        # Anything else that changes is the list, to the right of the matrix.
        (left, width), (right, other_width) = runs(np.flatnonzero(changed.any(axis=0)))[:2]
        # The frame hides a pixel at the outer edges.
        assert abs(width - cell) <= 1
        assert abs(other_width - cell) <= 1
        assert abs(right - left - (classes - 1) * cell) <= 1
        ((top, height),) = runs(np.flatnonzero(changed[:, left : left + width].any(axis=1)))
        assert height == cell
        # A corner: the middle of a cell may hold a number.
        corner = (top + height - 1, left + width - 1)
        assert first[corner].sum() > second[corner].sum() + 60
        tops.append(top)
    assert tops[1] - tops[0] == (classes - 3) * cell


def test_the_file_holds_the_same_picture(tmp_path):
    matrix = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 7]])
    save_confusion(tmp_path / "a.png", matrix, ["a", "b", "c"], "title")
    pixels = confusion_pixels(matrix, ["a", "b", "c"], "title")
    assert pixels.dtype == np.uint8
    with Image.open(tmp_path / "a.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved.convert("RGB")), pixels)
    # The class without videos is grey, which nothing else is.
    assert (pixels == 191).all(axis=2).sum() > 0.9 * 3 * 90 * 90
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("classes", [5, 60, 61, 700])
def test_pictures_stay_of_a_size_to_be_looked_at(classes):
    assert max(picture(classes, 1, 2).shape) < 2200


def test_names_where_they_fit_and_pairs_where_they_do_not():
    """Two lists of class names give two pictures exactly where names are shown."""
    matrix = np.diag(np.full(100, 10))
    plain = confusion_pixels(matrix, ["a"] * 100)
    assert np.array_equal(plain, confusion_pixels(matrix, ["b"] * 100))
    matrix[3, 7] = 2
    named, other = (confusion_pixels(matrix, [name] * 100) for name in "ab")
    assert named.shape[1] > 0
    assert not np.array_equal(named, other)
    few = np.diag(np.full(30, 10))
    assert not np.array_equal(*(confusion_pixels(few, [name] * 30) for name in "ab"))


def test_most_confused_pairs():
    matrix = np.array([[9, 2, 0], [2, 1, 5], [0, 0, 4]])
    # Of the two pairs with two videos first that of the smaller class.
    assert most_confused(matrix) == [(1, 2, 5), (1, 0, 2), (0, 1, 2)]
    assert most_confused(matrix, most=1) == [(1, 2, 5)]
    assert most_confused(np.diag([1, 2])) == []
    assert matrix[0, 0] == 9


def test_names_that_the_font_lacks_have_their_number():
    assert _name(7, "ü ß α") == "ü ß α"
    assert _name(7, "打太极") == "7 打太极"
    # Two classes whose names would be the same boxes can be told apart.
    matrix = np.diag([3, 4, 5])
    first = confusion_pixels(matrix, ["打太极", "b", "c"])
    assert not np.array_equal(first[:, :300], confusion_pixels(matrix, ["a", "b", "c"])[:, :300])


def test_the_list_says_what_it_is_sorted_by(monkeypatch):
    texts = []
    draw = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda self, x, y, s, **k: texts.append(s) or draw(self, x, y, s, **k)
    )
    picture(30, 1, 2)
    assert any("by number of videos" in text for text in texts)


def test_names_in_any_script_are_drawn_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = confusion_pixels(np.eye(3, dtype=int), ["打太极", "x\ny", "ü" * 200])
    assert found.shape[1] < 1000
