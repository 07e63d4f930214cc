"""The picture of a study: what is drawn lies where the results say, and all names can be read."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.text import Text

from ogreg_core.errors import DataError, UsageError
from ogreg_core.evidence.comparison import Cell
from ogreg_core.evidence.picture import draw_evidence, evidence_figure
from ogreg_core.evidence.study import Study
from ogreg_core.evidence.summary import DataFacts, Summary
from ogreg_core.profile_picture_parts import COLOURS
from ogreg_core.recipe import Recipe


def summary(rows: int, sets: int = 1, seeds: int = 3, spread: float = 2.5) -> Summary:
    """Made-up results; every third row is ours, every other one has a stem of its own."""
    rng = np.random.default_rng(rows)
    names = [f"{'OG-ReG' if n % 3 == 0 else 'Peer'} variant ${n}$" for n in range(rows)]
    study = Study(
        title="Every model at one size",
        recipe="base.toml",
        clips=4000,
        seeds=list(range(seeds)),
        reference=names[0],
        tuning={"lrs": [1e-3], "clips": 2000},
        rows=[
            {"name": name, "note": "own stem" if n % 2 else "conv stem"}
            for n, name in enumerate(names)
        ],
    )
    data = tuple(DataFacts(f"set{i}", 8, 400, 200, "a" * 64, "b" * 64, 10) for i in range(sets))
    cells = []
    for facts in data:
        for n, name in enumerate(names):
            top1s = dict(enumerate(60 + 10 * rng.standard_normal() + rng.normal(0, 3, seeds)))
            cells.append(
                Cell(
                    name,
                    facts.name,
                    model="ogreg-n" if n % 3 == 0 else "swin3d-t",
                    top1s=top1s,
                    mean=float(np.mean([*top1s.values()])),
                    controls={"shuffled": float(15 + 10 * rng.random())},
                    gmacs=float(0.1 * np.exp(spread * rng.random())),
                )
            )
    return Summary("made-up", study, Recipe(), data, tuple(cells), (), (), (), ())


def without(found: Summary, place: int) -> Summary:
    """The same with a cell that has no result yet."""
    cells = list(found.cells)
    cells[place] = Cell(cells[place].row, cells[place].dataset, missing={0: "not finished yet"})
    return replace(found, cells=tuple(cells))


CASES = {
    "five": summary(5),
    "fifteen": summary(15, 2),
    "crowd": summary(15, spread=0.2),
    "one": summary(1, seeds=1),
    "lacking": without(summary(4, 2), 5),
}


def line(ax, label: str):
    (found,) = (one for one in ax.lines if one.get_label() == label)
    return found


@pytest.mark.parametrize("name", CASES)
def test_everything_lies_where_the_results_say(name):
    found = CASES[name]
    figure = evidence_figure(found)
    assert len(figure.axes) == len(found.data)
    for ax, facts in zip(figure.axes, found.data, strict=True):
        assert ax.get_xscale() == "log"
        assert set(line(ax, "_chance").get_ydata()) == {12.5}
        for cell in (cell for cell in found.cells if cell.dataset == facts.name):
            if cell.mean is None:
                assert cell.row not in [one.get_label() for one in ax.lines]
                continue
            assert line(ax, cell.row).get_xydata().tolist() == [[cell.gmacs, cell.mean]]
            seeds = line(ax, f"_seeds {cell.row}").get_xydata().tolist()
            assert seeds == [[cell.gmacs, top1] for top1 in cell.top1s.values()]
            grey = line(ax, f"_shuffled {cell.row}").get_xydata().tolist()
            assert grey == [[cell.gmacs, cell.controls["shuffled"]]]
            low, high = ax.get_ylim()
            assert low <= 12.5 < high
            assert low < min(cell.controls["shuffled"], *cell.top1s.values(), 100)
            assert max(cell.top1s.values()) < high


@pytest.mark.parametrize("name", CASES)
def test_all_texts_can_be_read(name):
    figure = evidence_figure(CASES[name])
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [*figure.texts]
    for ax in figure.axes:
        texts += [*ax.texts, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    # An annotation's own extent holds its leader, too.
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts]
    boxes = [(text, box) for text, box in boxes if text]
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)
    for text, box in boxes:
        assert (box.min >= 0).all(), text
        assert (box.max <= np.array(figure.canvas.get_width_height()) + 1).all(), text
    pixels_per_point = 1000 / figure.get_size_inches()[0] / 72
    assert min(text.get_fontsize() for text in texts) * pixels_per_point > 10
    for cell in CASES[name].cells:
        assert cell.row in " ".join(text for text, _ in boxes)


def test_the_axis_of_multiply_adds_has_numbers():
    for found in (CASES["five"], CASES["crowd"], CASES["one"]):
        for ax in evidence_figure(found).axes:
            low, high = ax.get_xlim()
            assert sum(low <= place <= high for place in ax.xaxis.get_majorticklocs()) >= 2


def test_ours_and_stems_stand_out():
    figure = evidence_figure(CASES["five"])
    for n, cell in enumerate(CASES["five"].cells):
        dot = line(figure.axes[0], cell.row)
        ours = n % 3 == 0
        assert dot.get_marker() == ("D" if ours else "o")
        assert dot.get_color() == COLOURS[1 if ours else 0]
        filled = to_hex(dot.get_markerfacecolor()).upper()
        assert filled == ("#FFFFFF" if n % 2 else dot.get_color().upper())
    facts = " ".join(text.get_text() for text in figure.texts)
    assert "filled: conv stem; hollow: another stem" in facts
    assert "mean of 3 seeds" in facts
    # With one kind of stem there is nothing to tell.
    single = " ".join(text.get_text() for text in evidence_figure(CASES["one"]).texts)
    assert "hollow" not in single
    assert "one seed" in single


def test_what_is_not_drawn_is_noted():
    found = CASES["lacking"]
    cells = list(found.cells)
    cells[0] = replace(cells[0], top1s={0: 50.0, 2: 52.0}, missing={1: "not finished yet"})
    notes = [t.get_text() for t in evidence_figure(replace(found, cells=tuple(cells))).texts]
    assert "set1: no result yet of Peer variant $1$" in notes
    assert "set0: not all seeds yet of OG-ReG variant $0$ (2 of 3)" in notes


def test_a_data_set_without_results_has_no_panel():
    found = without(without(summary(2, 2), 2), 3)
    figure = evidence_figure(found)
    assert [ax.get_title(loc="left").split(",")[0] for ax in figure.axes] == ["set0"]
    with pytest.raises(DataError, match="no training of made-up has ended"):
        evidence_figure(without(without(found, 0), 1))


def test_the_file_is_a_picture(tmp_path):
    draw_evidence(CASES["five"], tmp_path / "models.png")
    assert imread(tmp_path / "models.png").shape[1] == 1200
    with pytest.raises(UsageError, match="no known ending"):
        draw_evidence(CASES["five"], tmp_path / "models.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["models.png"]
