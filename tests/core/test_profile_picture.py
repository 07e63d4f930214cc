"""Pictures of costs: what is drawn lies where the numbers say, and no text lies on another."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from ogreg_core.errors import DataError, UsageError
from ogreg_core.label_places import place_labels, spread
from ogreg_core.profile_picture import check_picture, costs_figure, draw_costs

MACHINE = {"device": "cpu", "dtype": "bfloat16", "threads": 2}
FAILED = "out of memory"


def compared(model: str, gmacs: float, ms: float, **more) -> dict:
    return {
        **{"model": model, "frames": 16, "size_px": 224, "params": 28_000_000},
        **{"gmacs_per_view": gmacs, "latency_ms_p50": ms, "latency_ms_p90": 1.2 * ms},
        **{"latency_ratio": ms / 300, "training_ms_p50": None, "best": None, **more},
    }


def comparison(*models: dict) -> dict:
    return {**MACHINE, "schema": "ogreg.profile-compare.v2", "repeats": 5, "models": list(models)}


def module(name: str, gmacs: float, params: float = 0, activations: float = 0) -> dict:
    depth = 1 + name.count(".")
    return {
        **{"name": name, "type": "Module", "depth": depth, "gmacs": gmacs},
        **{"params": params, "activations_m": activations},
    }


def profile(*modules: dict, **more) -> dict:
    top = [row for row in modules if row["depth"] == 1]
    return {
        **{**MACHINE, "schema": "ogreg.profile.v2", "model": "ogreg-t", "options": {}},
        **{"frames": 32, "size_px": 224, "attention_gmacs": 2.0, "modules": list(modules)},
        "params": sum(row["params"] for row in top),
        "gmacs_per_view": sum(row["gmacs"] for row in top),
        "activations_m": sum(row["activations_m"] for row in top),
        **{"throughput": [], "operators": [], "training": None, **more},
    }


def point(value: int, gmacs: float, ms: float) -> dict:
    latency = {"latency_ms_p50": ms, "latency_ms_p90": 1.1 * ms}
    return {"value": value, "gmacs_per_view": gmacs, **latency, "activations_m": 5.0}


def sweep(values: list[int], models: dict[str, list[dict]], over: str = "frames") -> dict:
    rows = [{"model": model, "points": points} for model, points in models.items()]
    head = {**MACHINE, "schema": "ogreg.profile-sweep.v1", "over": over, "values": values}
    return {**head, "models": rows}


def trained(model: str, gmacs: float, ms: float, clips_per_s: float) -> dict:
    best = {"batch": 8, "clips_per_s": clips_per_s, "ratio": clips_per_s / 5}
    return compared(model, gmacs, ms, training_ms_p50=3 * ms, best=best)


def cluster(models: int, spacing: float) -> dict:
    """Nearly the same figures for all of them, and long names."""
    rng = np.random.default_rng(0)
    return comparison(
        *(
            compared(
                f"{'ogreg' if n % 5 == 0 else 'other'}-{n}-$with_a_long_name_of_somebody$",
                33.5 * (1 + spacing * rng.random()),
                300 * (1 + spacing * rng.random()),
            )
            for n in range(models)
        )
    )


THREE = comparison(
    trained("ogreg-t", 33.5, 300, 5), trained("swin3d-t", 44, 520, 2.5), compared("s3d", 18, 200)
)
TRAINED = comparison(trained("ogreg-t", 33.5, 300, 5), trained("swin3d-t", 44, 520, 2.5))
WIDE = comparison(
    compared("ogreg-n", 0.3, 3), compared("ogreg-t", 67, 900), compared("x", 986, 15e3)
)
STAGES = profile(
    *(module("stem", 2, 1e4, 8), module("stages", 90, 2e7, 150), module("norm", 0, 1e3)),
    *(module("stages.0", 30, 4e6, 100), module("stages.1", 57, 15e6, 40), module("dropout", 0)),
    module("head", 8, 2e6, 0.4),
    throughput=[
        *({"batch": b, "clips_per_s": 10.0 * b, "ms_p50": 100.0} for b in (1, 2, 4)),
        {"batch": 8, "error": FAILED},
    ],
    operators=[
        {"name": "aten::gelu", "calls": 24, "ms": 50.0, "share_pct": 10.0},
        {"name": "aten::_scaled_dot_product_attention", "calls": 24, "ms": 90.0, "share_pct": 18.0},
        {"name": "aten::addmm", "calls": 120, "ms": 300.0, "share_pct": 60.0},
    ],
)
MANY_PARTS = profile(*(module(f"a_module_with_a_long_name_{n}", n + 1, 1e6, 3) for n in range(30)))
FRAMES = sweep(
    [8, 16, 32],
    {
        "ogreg-t": [point(8, 16, 140), point(16, 33, 290), point(32, 67, 600)],
        "swin3d-t": [point(8, 22, 300), point(16, 44, 620), {"value": 32, "error": FAILED}],
        "xvit": [
            {"value": v, "error": "fixed"} if v != 16 else point(16, 281, 2e3) for v in (8, 16, 32)
        ],
        "s3d": [{"value": v, "error": FAILED} for v in (8, 16, 32)],
    },
)
SAME = sweep(
    [1, 2], {f"variant {n}": [point(1, 5, 9), point(2, 5, 17)] for n in range(19)}, "batch"
)
DOCUMENTS = {
    **{
        "three": THREE,
        "trained": TRAINED,
        "wide": WIDE,
        "one": comparison(compared("s3d", 18, 200)),
    },
    **{"twins": cluster(2, 0), "crowd": cluster(19, 0.02), "heap": cluster(19, 0)},
    **{"stages": STAGES, "parts": MANY_PARTS, "frames": FRAMES, "same": SAME},
    "bare": profile(
        module("all", 1, 1, 1), throughput=[{"batch": 1, "clips_per_s": 2.0, "ms_p50": 500.0}]
    ),
    "dear": profile(
        module("m", 1, 1, 1), training={"ms_p50": 1234.0}, options={"stem": "conv" * 40}
    ),
    "point": sweep([224], {"ogreg-t": [point(224, 5, 9)]}, "size"),
}


def panel(figure, title: str):
    """The axes below a title, or, without titles, of a label."""
    (ax,) = (
        ax
        for ax in figure.axes
        if title in (ax.get_title(loc="left").split(",")[0], ax.get_xlabel().split(",")[0])
    )
    return ax


def line(ax, label: str) -> tuple[list[float], list[float]]:
    (found,) = (one for one in ax.lines if one.get_label() == label)
    return list(found.get_xdata()), list(found.get_ydata())


def bars(ax) -> dict[str, float]:
    """Length of each bar by the name at its left, or by its place."""
    names = [label.get_text() for label in ax.get_yticklabels()] or range(len(ax.patches))
    return dict(zip(names, (bar.get_width() for bar in ax.patches), strict=True))


def texts_of(figure) -> list[Text]:
    """All texts that are seen, numbers on the axes included."""
    texts = [*figure.texts]
    for ax in figure.axes:
        texts += [*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            inside = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in inside if tick.label1.get_visible()]
    return [text for text in texts if text.get_text() and text.get_visible()]


def box_of(text: Text, figure):
    # An annotation's own extent holds its leader, too.
    return Text.get_window_extent(text, figure.canvas.get_renderer())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_everything_can_be_read(name):
    figure = costs_figure(DOCUMENTS[name])
    figure.canvas.draw()
    boxes = [(text, box_of(text, figure)) for text in texts_of(figure)]
    assert_clear(boxes, *figure.canvas.get_width_height())
    pixels_per_point = 800 / figure.get_size_inches()[0] / 72
    assert min(text.get_fontsize() for text, _ in boxes) * pixels_per_point > 9
    texts = " ".join(text.get_text() for text, _ in boxes)
    assert "cpu, bfloat16, 2 threads" in texts
    assert "one multiply-add counts once" in texts
    for row in DOCUMENTS[name].get("models", [DOCUMENTS[name]]):
        # Long names lose their middle.
        assert row["model"][:12] in texts
        assert row["model"][-12:] in texts


def assert_clear(boxes, width: int, height: int) -> None:
    """No text lies on another, or outside the picture."""
    for (one, a), (other, b) in combinations(boxes, 2):
        # A pixel of the space around letters does not matter.
        assert not a.padded(-1).overlaps(b.padded(-1)), (one.get_text(), other.get_text())
    for text, box in boxes:
        assert (box.min >= 0).all(), text
        assert (box.max <= [width + 1, height + 1]).all(), text


def test_dots_lie_where_the_numbers_say():
    for document in (THREE, WIDE, cluster(19, 0.02)):
        ax = panel(costs_figure(document), "multiply-adds per view")
        for row in document["models"]:
            x, y = row["gmacs_per_view"], row["latency_ms_p50"]
            assert line(ax, row["model"]) == ([x], [y])
            assert ax.get_xlim()[0] < x < ax.get_xlim()[1]
            assert ax.get_ylim()[0] < y < ax.get_ylim()[1]
        slow = sorted(tuple(o.get_ydata()) for o in ax.lines if o.get_label() == "_to p90")
        expected = [(r["latency_ms_p50"], r["latency_ms_p90"]) for r in document["models"]]
        assert slow == sorted(expected)


def test_axes_are_logarithmic_where_the_range_asks_for_it():
    scales = [
        panel(costs_figure(document), "multiply-adds per view").get_yscale()
        for document in (THREE, WIDE)
    ]
    assert scales == ["linear", "log"]


@pytest.mark.parametrize("document", [THREE, WIDE], ids=["linear", "log"])
def test_grey_lines_are_of_the_speed_at_their_ends(document):
    figure = costs_figure(document)
    figure.canvas.draw()
    ax = panel(figure, "multiply-adds per view")
    lines = [o.get_xydata() for o in ax.lines if o.get_label() == "_speed"]
    named = [text for text in ax.texts if text.get_text().endswith(" GMAC/s")]
    assert named
    for text in named:
        speed = float(text.get_text().split()[0])
        gmacs, ms = text.xy
        assert 1000 * gmacs / ms == pytest.approx(speed)
        assert any(np.allclose(1000 * xy[:, 0] / xy[:, 1], speed) for xy in lines if xy[0, 1])


def test_ogreg_models_stand_out():
    ax = panel(costs_figure(THREE), "multiply-adds per view")
    looks = {o.get_label(): (o.get_color(), o.get_marker()) for o in ax.lines}
    assert looks["swin3d-t"] == looks["s3d"]
    assert all(a != b for a, b in zip(looks["ogreg-t"], looks["s3d"], strict=True))
    weights = {t.get_text(): t.get_fontweight() for t in ax.texts}
    assert (weights["ogreg-t"], weights["s3d"]) == ("bold", "normal")


def test_names_stay_near_their_dots():
    figure = costs_figure(THREE)
    figure.canvas.draw()
    ax = panel(figure, "multiply-adds per view")
    for row in THREE["models"]:
        (text,) = (text for text in ax.texts if text.get_text() == row["model"])
        box = box_of(text, figure)
        dot = ax.transData.transform((row["gmacs_per_view"], row["latency_ms_p50"]))
        nearest = np.clip(dot, box.min, box.max)
        assert np.linalg.norm(nearest - dot) < 2 * box.height


def test_bars_are_the_ratios_in_order():
    figure = costs_figure(TRAINED)
    assert bars(panel(figure, "latency")) == {"ogreg-t": 1.0, "swin3d-t": 520 / 300}
    assert list(bars(panel(figure, "training step")).values()) == pytest.approx([1, 520 / 300])
    assert list(bars(panel(figure, "throughput")).values()) == [1.0, 0.5]
    assert panel(figure, "throughput").texts[1].get_text() == "0.50×   2.5/s at 8"


def test_what_was_measured_of_some_models_only_is_drawn_of_them():
    figure = costs_figure(THREE)
    assert list(bars(panel(figure, "latency"))) == ["s3d", "ogreg-t", "swin3d-t"]
    ax = panel(figure, "training step")
    np.testing.assert_allclose([b.get_width() for b in ax.patches], [np.nan, 1, 520 / 300])
    assert [t.get_text() for t in ax.texts] == ["no figure", "1.00×   900 ms", "1.73×   1560 ms"]
    titles = [ax.get_title(loc="left") for ax in costs_figure(WIDE).axes]
    assert titles == ["", "latency"]


def test_wide_ratios_begin_at_one():
    ax = panel(costs_figure(WIDE), "latency")
    assert ax.get_xscale() == "log"
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches]
    np.testing.assert_allclose(ends, [(1, 0.01), (1, 3), (1, 50)])


def test_different_inputs_are_named():
    document = comparison(compared("a", 1, 2), compared("b", 2, 3, frames=8, size_px=112))
    assert list(bars(panel(costs_figure(document), "latency"))) == ["a  16×224×224", "b  8×112×112"]


def test_parts_are_shares_of_the_model():
    figure = costs_figure(STAGES)
    # stages has nine tenths of the products: its parts stand for it; dropout costs nothing.
    total = STAGES["gmacs_per_view"]
    shares = bars(panel(figure, "multiply-adds"))
    assert list(shares) == ["stages.1", "stages.0", "head", "stages.(own)", "stem", "norm"]
    expected = {"stages.1": 57, "stages.0": 30, "head": 8, "stages.(own)": 3, "stem": 2, "norm": 0}
    assert shares == pytest.approx({name: 100 * g / total for name, g in expected.items()})
    assert sum(bars(panel(figure, "parameters")).values()) == pytest.approx(100)
    activations = list(bars(panel(figure, "activations")).values())
    np.testing.assert_allclose(activations, np.array([40, 100, 0.4, 10, 8, 0]) / 1.584)


def test_many_parts_are_summed_up():
    shares = bars(panel(costs_figure(MANY_PARTS), "multiply-adds"))
    assert len(shares) == 16
    assert sum(shares.values()) == pytest.approx(100)
    assert shares["15 others"] == pytest.approx(100 * sum(range(1, 16)) / sum(range(1, 31)))


def test_bars_end_before_their_texts():
    figure = costs_figure(MANY_PARTS)
    for ax in figure.axes:
        ends = [ax.transData.transform((bar.get_width(), 0))[0] for bar in ax.patches]
        assert max(ends) < min(box_of(text, figure).x0 for text in ax.texts)


def test_throughput_and_failed_batches():
    figure = costs_figure(STAGES)
    ax = panel(figure, "throughput")
    x, y = line(ax, "throughput")
    assert x == [0, 1, 2, 3]
    np.testing.assert_array_equal(y, [10, 20, 40, math.nan])
    assert line(ax, "failed")[0] == [3]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1", "2", "4", "8"]
    assert f"× batch 8: {FAILED}" in said(figure)


def test_operators_from_the_largest():
    shares = bars(panel(costs_figure(STAGES), "operators by share of time: ms and calls"))
    assert list(shares.values()) == [60, 18, 10]
    assert next(iter(shares)) == "aten::addmm"


def test_reasons_for_missing_figures_are_noted():
    left_out = [{"model": "xvit", "error": "takes 16 frames"}]
    untrained = compared("s3d", 1, 2, training_error=FAILED)
    notes = said(costs_figure({**comparison(untrained), "left_out": left_out}))
    assert "xvit: takes 16 frames" in notes
    assert f"training step of s3d: {FAILED}" in notes
    failed = [{"batch": 1, "error": FAILED}]
    figure = costs_figure(profile(module("m", 1), throughput=failed, training_error="too large"))
    assert f"× batch 1: {FAILED}" in said(figure)
    assert "training step: too large" in said(figure)


def test_input_and_options_are_said():
    row = {"model": "ogreg-t", "options": {"stem": "patch"}, "points": [point(8, 1, 2)]}
    for kept, words in (
        ({"frames": None, "size_px": 112}, "frames per clip: 8; 112×112 pixels"),
        ({}, "frames per clip: 8; all else as each model's input"),
    ):
        text = said(costs_figure({**sweep([8], {}), "models": [{**row, **kept}]}))
        assert "Cost against frames: ogreg-t, stem=patch" in text
        assert words in text
    text = said(costs_figure({**STAGES, "options": {"strides": [8, 4, 2, 1]}}))
    assert "ogreg-t, strides=8-4-2-1" in text
    assert "input 32×224×224" in text
    assert "input 16×224×224" in said(costs_figure(THREE))


def said(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def test_sweep_lines_have_the_figures():
    figure = costs_figure(FRAMES)
    cost, latency = panel(figure, "multiply-adds per view"), panel(figure, "latency")
    assert line(cost, "ogreg-t") == ([8, 16, 32], [16, 33, 67])
    assert line(latency, "swin3d-t") == ([8, 16], [300, 620])
    assert line(latency, "xvit") == ([16], [2000])
    assert line(latency, "failed")[0] == [8, 16, 32]
    assert "s3d" not in {o.get_label() for o in latency.lines}
    assert [label.get_text() for label in latency.get_xticklabels()] == ["8", "16", "32"]
    notes = said(figure)
    assert f"× {FAILED}: swin3d-t at 32; s3d at 8, 16, 32" in notes
    assert "× fixed: xvit at 8, 32" in notes


def test_sweep_lines_differ_in_more_than_colour():
    latency = panel(costs_figure(SAME), "latency")
    looks = [(o.get_color(), o.get_linestyle(), o.get_marker()) for o in latency.lines]
    assert len(set(looks)) == len(looks) == 19


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"schema": "ogreg.eval.v1"}, "ogreg.eval.v1"),
        ({}, "None"),
        (comparison(), "no model"),
        (sweep([8], {"a": [{"value": 8, "error": FAILED}]}), FAILED),
    ],
)
def test_what_cannot_be_drawn_is_said(tmp_path, document, words):
    with pytest.raises(DataError, match=words) as caught:
        draw_costs(document, tmp_path / "c.png")
    assert caught.value.fix.startswith("ogreg profile ")
    assert not list(tmp_path.iterdir())


def test_the_ending_says_the_format(tmp_path):
    for name, begin in (("c.PNG", b"\x89PNG"), ("c.pdf", b"%PDF"), ("c.svg", b"<?xml")):
        draw_costs(THREE, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    assert imread(tmp_path / "c.PNG", format="png").shape[1] == 1200
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("path", "fix"),
    [
        ("a/costs.jpg", "--plot a/costs.png"),
        ("my costs", "--plot 'my costs.png'"),
        ("", "--plot costs.png"),
    ],
)
def test_other_endings_are_refused(path, fix):
    for refuse in (check_picture, lambda path: draw_costs(THREE, path)):
        with pytest.raises(UsageError, match="ending") as caught:
            refuse(Path(path))
        assert caught.value.fix == fix


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    path.write_bytes(b"old")

    def fail(*_args, **_options):
        raise OSError("broken")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="broken"):
        draw_costs(THREE, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_checking_a_path_loads_neither_torch_nor_matplotlib():
    code = (
        "import sys; from pathlib import Path; from ogreg_core.profile_picture import check_picture;"
        "check_picture(Path('a.svg')); print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_signs_without_a_letter_in_the_font_are_no_warning(tmp_path, recwarn):
    draw_costs(comparison(compared("动作$x$\n", 1, 2)), tmp_path / "c.png")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@pytest.mark.parametrize("seed", range(8))
def test_labels_lie_on_no_label_or_dot(seed):
    rng = np.random.default_rng(seed)
    models = int(rng.integers(1, 20))
    spacing = 10.0 ** rng.uniform(0, 2.5)
    dots = np.array([500.0, 300.0]) + spacing * rng.uniform(-1, 1, (models, 2))
    sizes = np.stack([rng.uniform(30, 200, models), np.full(models, 15.0)], axis=-1)
    corners = place_labels(dots, sizes, np.array([0.0, 0.0, 1000.0, 600.0]))
    for i, j in combinations(range(models), 2):
        apart = np.maximum(corners[i], corners[j]) >= np.minimum(
            corners[i] + sizes[i], corners[j] + sizes[j]
        )
        assert apart.any(), (i, j)
    for dot in dots:
        assert not ((dot > corners) & (dot < corners + sizes)).all(axis=1).any()
    assert (corners >= 0).all()
    assert (corners + sizes <= [1000, 600]).all()


@pytest.mark.parametrize("seed", range(8))
def test_spread_is_the_nearest_with_gaps(seed):
    rng = np.random.default_rng(seed)
    wanted = rng.uniform(0, 10, int(rng.integers(1, 12)))
    found = spread(wanted, 0.7, 0.0, 10.0)
    order = np.argsort(wanted)
    assert (np.diff(found[order]) >= 0.7 - 1e-9).all()
    assert found.min() >= 0
    assert found.max() <= 10
    # The minimum-maximum formula of isotonic regression, clipped to the room.
    free = wanted[order] - 0.7 * np.arange(len(wanted))
    level = [
        max(min(free[j : k + 1].mean() for k in range(i, len(free))) for j in range(i + 1))
        for i in range(len(free))
    ]
    level = np.clip(level, 0, 10 - 0.7 * (len(free) - 1))
    np.testing.assert_allclose(found[order], level + 0.7 * np.arange(len(free)))


def test_spread_squeezes_where_there_is_no_room():
    np.testing.assert_allclose(spread(np.zeros(5), 1.0, 0.0, 2.0), [0, 0.5, 1, 1.5, 2])
    assert spread(np.zeros(0), 1.0, 0.0, 2.0).shape == (0,)
