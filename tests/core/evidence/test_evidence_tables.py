"""The report's tables: every figure where it belongs, and a reason for every empty cell."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from ogreg_core.evidence.results import Identity, Result
from ogreg_core.evidence.study import Study
from ogreg_core.evidence.summary import DataFacts, Failure, Summary, Tuned, summarise

# A class called Tests would be taken for one.
from ogreg_core.evidence.summary import Tests as OnData
from ogreg_core.evidence.tables import markdown, terminal_tables
from ogreg_core.recipe import Recipe

COMMAND = "ogreg evidence models data/hard 'data/with space'"
VIDEOS = 100
REASON = "ValueError: a | b\nis <none>"


def study(seeds=(0, 1, 2), **more) -> Study:
    return Study(
        title="Every model",
        recipe="base.toml",
        clips=4000,
        seeds=list(seeds),
        reference="ours",
        tuning={"lrs": [1e-3, 5e-4, 2e-3], "clips": 2000, "held_out": 0.2},
        **more
        or {
            "rows": [
                {"name": "ours", "note": "conv stem", "changes": ["model.name=ogreg-n"]},
                {"name": "peer_a", "note": "own stem", "changes": ["train.optimizer=sgd"]},
                {"name": "half", "lr_of": "ours"},
                {"name": "none", "lr": 3e-4},
            ]
        },
    )


def result(seed: int, right: int, videos: int = VIDEOS, **more) -> Result:
    bits = "1" * right + "0" * (videos - right)
    values = {
        **{"dataset": "hard", "model": "ogreg-n", "changes": (), "lr": 1e-3, "clips": 4000},
        **{"status": "done", "seconds": 60.0, "params": 1_234_567, "gmacs": 0.25},
        "right": {"none": bits, "shuffled": "1" * 17 + "0" * (videos - 17)},
        "made": {"device": "cpu", "threads": 1},
    }
    return Result(Identity("e", "t", "v", seed), **{**values, **more})


def rows() -> dict[str, list[Result]]:
    lost = replace(result(1, 0), status="failed", reason=REASON, right={})
    return {
        "ours": [result(seed, 50 + seed) for seed in range(3)],
        "peer_a": [
            result(seed, 80 + seed, seconds=90.0, gmacs=1.5, model="swin3d-t") for seed in range(3)
        ],
        "half": [result(0, 60), lost],
    }


def facts(name: str = "hard") -> DataFacts:
    return DataFacts(name, 8, 1400, VIDEOS, "0123456789abcdef" * 4, "f" * 64, 10)


TUNED = [
    Tuned("ours", "hard", 1e-3, {5e-4: 41.0, 1e-3: 52.5, 2e-3: None}),
    Tuned("peer_a", "hard", 2e-3, {5e-4: 40.0, 1e-3: 41.0, 2e-3: 45.0}),
    Tuned("half", "hard", 1e-3, {5e-4: 41.0, 1e-3: 52.5, 2e-3: None}),
    Tuned("none", "hard", 3e-4, is_given=True),
]
DIVERGED = Failure("ours", "hard-tuning", 100, 2e-3, "the loss is not a number")


@pytest.fixture(scope="module")
def found() -> Summary:
    recipe = Recipe(data={"size": 48, "short_side": 48})
    tests = [OnData(facts(), rows()), OnData(facts("calm"), {"ours": rows()["ours"]})]
    return summarise("models", study(), recipe, tests, TUNED, [DIVERGED])


@pytest.fixture(scope="module")
def text(found) -> str:
    return markdown(found, COMMAND, "models.png")


def table(text: str, title: str) -> list[dict[str, str]]:
    """The rows of the table below a heading, by the names of the columns."""
    section = text.partition(f"### {title}\n")[2].partition("\n### ")[0]
    lines = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert len({len(line) for line in lines}) == 1
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_row_has_all_its_figures(text, found):
    ours, peer, *_ = table(text, "hard")
    assert ours == {
        **{"model": "**ours**", "note": "conv stem", "params (M)": "1.23", "GMACs": "0.25"},
        **{
            "lr": "0.001",
            "top-1 [95 %]": "51.0 [48.5, 53.5]",
            "seeds 0, 1, 2": "50.0 / 51.0 / 52.0",
        },
        **{"difference [95 %]": "reference", "p": "", "shuffled": "17.0"},
        **{"middle": "- <sup>a</sup>", "training, s": "60 (1.00×)"},
    }
    assert (peer["model"], peer["training, s"], peer["GMACs"]) == ("peer\\_a", "90 (1.50×)", "1.5")
    difference = found.cell("peer_a", "hard").difference
    expected = f"+30.0 [{difference.low:+.1f}, {difference.high:+.1f}]"
    assert peer["difference [95 %]"] == expected
    assert difference.p < 1e-4
    assert peer["p"] == "\\<0.0001"


def test_the_terms_stand_above_the_table(text):
    caption = text.partition("### hard\n\n")[2].partition("\n")[0]
    for words in (
        *("8 classes, 1 400 training and 100 test videos; chance is 12.5 %", "16 uniform frames"),
        *("48 px, from scratch", "14 000 clips seen in 10 epochs", "batches of 8", "AdamW"),
        *("seeds 0, 1, 2", "0.001, 0.0005, 0.002", "train `0123456789ab`", "test `ffffffffffff`"),
        *("on 1 view", "10 % of linear warm-up", "peer\\_a: train.optimizer=sgd."),
    ):
        assert words in caption
    assert "(cpu, 1 thread)" in text


def test_other_terms_are_said_as_well():
    recipe = Recipe(
        data={"sampling": "dense", "stride": 4},
        train={"optimizer": "nesterov", "batch_size": 16},
        eval={"clips": 5, "crops": 3},
        init={"weights": "swin_t"},
    )
    one = study(rows=[{"name": "ours"}])
    text = markdown(summarise("s", one, recipe, [OnData(facts(), {})]), COMMAND)
    for words in ("16 dense frames with stride 4", "Nesterov", "batches of 16", "on 15 views"):
        assert words in text
    assert "from swin\\_t" in text
    assert "![" not in text


def test_every_empty_cell_has_its_reason(text):
    half, none = table(text, "hard")[2:]
    notes = dict(re.findall(r"^<sup>(\w+)</sup> (.*)$", text.partition("### calm")[0], re.M))
    assert half["seeds 0, 1, 2"].startswith("60.0 / - / - <sup>")
    for row in (half, none):
        for name, cell in row.items():
            if "-" in cell.split() and name != "note":
                assert notes[re.findall(r"<sup>(\w+)</sup>", cell)[0]]
    mark = re.findall(r"<sup>(\w+)</sup>", half["seeds 0, 1, 2"])[0]
    assert notes[mark] == (
        "seed 1 failed: ValueError: a \\| b is \\<none>; seed 2 not finished yet"
    )
    assert (
        "one seed has no interval"
        in notes[re.findall(r"<sup>(\w+)</sup>", half["top-1 [95 %]"])[0]]
    )
    assert (
        "over seed 0 only" in notes[re.findall(r"<sup>(\w+)</sup>", half["difference [95 %]"])[0]]
    )
    assert none["lr"] == "0.0003"
    assert notes[re.findall(r"<sup>(\w+)</sup>", none["p"])[0]] == "seeds 0, 1, 2 not finished yet"


def test_rates_not_chosen_yet_are_said():
    one = study(rows=[{"name": "ours"}, {"name": "b"}])
    text = markdown(summarise("s", one, Recipe(), [OnData(facts(), {})]), COMMAND)
    ours = table(text, "hard")[0]
    mark = re.findall(r"<sup>(\w+)</sup>", ours["lr"])[0]
    assert f"<sup>{mark}</sup> its learning rate is not chosen yet" in text


def test_verdicts_over_the_data_sets(text, found):
    peer, half, none = table(text, "Over all data sets")
    assert peer["hard"].startswith("+30.0 [")
    assert peer["calm"] == "-"
    assert peer["verdict"] == "not settled: peer\\_a lacks seeds on calm"
    assert half["model"] == "half"
    assert none["hard"] == "-"
    assert "within ±5 points" in text
    assert "for the 3 comparisons" in text


def test_failures_are_listed(text, found):
    section = text.partition("### Failed trainings\n\n")[2].partition("\n\n")[0]
    assert section.splitlines() == [
        "- ours on hard-tuning, seed 100, lr 0.002: the loss is not a number",
        "- half on hard, seed 1, lr 0.001: ValueError: a \\| b is \\<none>",
    ]
    one = study(rows=[{"name": "ours"}])
    without = markdown(summarise("s", one, Recipe(), [OnData(facts(), {})]), COMMAND)
    assert "### Failed trainings\n\nNone." in without
    assert "### Over all data sets" not in without
    assert "### Learning rates" not in without


def test_the_tuning_is_shown(text):
    ours, peer, half, none = table(text, "Learning rates on hard")
    assert [*ours] == ["model", "0.0005", "0.001", "0.002", "chosen"]
    assert [*ours.values()] == ["ours", "41.0", "**52.5**", "failed", "0.001"]
    section = text.partition("### Learning rates on hard")[2]
    notes = dict(re.findall(r"^<sup>(\w+)</sup> (.*)$", section, re.M))
    assert (peer["0.002"], peer["chosen"][:5]) == ("**45.0**", "0.002")
    assert "end of the grid" in notes[peer["chosen"][-7]]
    assert notes[half["chosen"][-7]] == "the rate of ours"
    assert notes[none["0.001"][-7]] == "the study gives the rate"
    assert none["chosen"] == "0.0003"
    assert "20 % of each class's training videos" in section
    assert "2 000 clips with seed 100" in section


def test_the_report_ends_with_its_command(text):
    assert text.endswith(f"```sh\n{COMMAND}\n```\n")
    assert text.startswith("## Every model\n\n![")
    assert "](models.png)" in text


def test_terminal_tables_have_the_same_figures(found, text):
    hard, calm, verdicts = terminal_tables(found)
    rows = {row[0]: dict(zip(hard.header, row, strict=True)) for row in hard.rows}
    for row in table(text, "hard"):
        name = row["model"].strip("*").replace("\\", "")
        for column in ("GMACs", "top-1 [95 %]", "difference [95 %]", "p", "shuffled"):
            expected = row[column].partition(" <sup>")[0].replace("\\", "")
            assert rows[name][column] == expected
    assert "none: seeds 0, 1, 2 not finished yet" in hard.notes
    assert any(note.startswith("half: difference over seed 0 only") for note in hard.notes)
    assert calm.title.startswith("calm")
    assert ("peer_a", "not settled: peer_a lacks seeds on calm") in verdicts.rows


def test_terminal_tables_fit_100_columns():
    """With the longest figures there can be, and long names."""
    names = ["ours", "A model with a very long name 1", "A model with a very long name 2"]
    right = dict(zip(names, (100, 5, 0), strict=True))
    results = {
        row: [
            replace(result(s, max(n - 5 * s, 0), gmacs=0.0123), right=_right(max(n - 5 * s, 0)))
            for s in range(3)
        ]
        for row, n in right.items()
    }
    many = study(rows=[{"name": name} for name in names])
    data = [OnData(facts(f"set{i}"), results) for i in range(2)]
    for found in terminal_tables(summarise("s", many, Recipe(), data)):
        rich = Table(title=found.title, title_justify="left")
        for number, name in enumerate(found.header):
            justify = "right" if number in found.right else "left"
            rich.add_column(name, justify=justify, overflow="fold")
        for row in found.rows:
            rich.add_row(*row)
        console = Console(file=io.StringIO(), width=200)
        assert console.measure(rich).maximum <= 100


def _right(count: int) -> dict[str, str]:
    return {
        "none": "1" * count + "0" * (VIDEOS - count),
        "shuffled": "1" * VIDEOS,
        "middle": "0" * VIDEOS,
    }


def test_judged_controls_have_tables_of_their_own():
    terms = study(
        controls=["shuffled"], judged=["shuffled"], rows=[{"name": "ours"}, {"name": "b"}]
    )
    data = {"ours": rows()["ours"], "b": [result(seed, 50) for seed in range(3)]}
    # The peer is as good on shuffled frames as on plain ones, ours is not.
    for given in data["b"]:
        given.right["shuffled"] = given.right["none"]
    tests = [OnData(facts(name), data) for name in ("hard", "calm")]
    found = summarise("models", terms, Recipe(), tests)
    text = markdown(found, COMMAND)
    (plain,) = table(text, "Over all data sets")
    (shuffled,) = table(text, "Over all data sets, frames in random order")
    assert shuffled["hard"].startswith("+33.0 [")
    assert shuffled["verdict"] == "better"
    assert plain["verdict"] != "better"
    shown = [(table.header[1], dict(table.rows)) for table in terminal_tables(found)[-2:]]
    assert shown[0] == ("against ours", {"b": plain["verdict"]})
    assert shown[1] == ("against ours, frames in random order", {"b": "better"})


def test_pairs_have_a_table_of_their_own():
    terms = study(rows=[{"name": "ours"}, {"name": "a_stem"}, {"name": "b", "against": "a_stem"}])
    results = {"ours": (80, 81, 82), "a_stem": (30, 31, 32), "b": (60, 61, 62)}
    data = {row: [result(s, n) for s, n in enumerate(found)] for row, found in results.items()}
    tests = [OnData(facts(name), data) for name in ("hard", "calm")]
    found = summarise("models", terms, Recipe(), tests)
    text = markdown(found, COMMAND)
    assert [row["verdict"] for row in table(text, "Over all data sets")] == ["worse", "worse"]
    (pair,) = table(text, "Over all data sets, against a\\_stem")
    assert re.fullmatch(r"\+30\.0 \[\S+, \S+\], p \\<0\.0001", pair["hard"])
    assert (pair["model"], pair["verdict"]) == ("b", "better")
    shown = terminal_tables(found)[-1]
    assert (shown.title, shown.header) == ("verdicts over 2 data sets", ("model", "against a_stem"))
    assert shown.rows == (("b", "better"),)
    assert "for the 3 comparisons" in text


def test_rows_at_chance_and_given_rates_are_marked():
    data = {"ours": [result(seed, 12 + 20 * seed) for seed in range(3)]}
    terms = study(rows=[{"name": "ours", "lr": 1e-3}])
    tuned = [Tuned("ours", "hard", 1e-3, is_given=True)]
    text = markdown(summarise("models", terms, Recipe(), [OnData(facts(), data)], tuned), COMMAND)
    mark = re.search(r"<sup>(\w)</sup> no better than chance: seed 0\n", text)[1]
    assert f"<sup>{mark}</sup>" in table(text, "hard")[0]["top-1 [95 %]"]
    assert "learning rates given by the study." in text


def test_rates_chosen_at_chance_are_marked_wherever_they_are_used():
    terms = study(rows=[{"name": "ours"}, {"name": "b"}, {"name": "c", "lr_of": "b"}])
    tuned = [
        Tuned("ours", "hard", 1e-3, {1e-3: 50.0}),
        Tuned("b", "hard", 2e-3, {2e-3: 12.0}, is_blind=True),
        Tuned("c", "hard", 2e-3, is_blind=True),
    ]
    data = {name: [result(seed, 50) for seed in range(3)] for name in ("ours", "b", "c")}
    text = markdown(summarise("models", terms, Recipe(), [OnData(facts(), data)], tuned), COMMAND)
    for title, column in (("hard", "lr"), ("Learning rates on hard", "chosen")):
        mark = re.search(
            rf"### {title}\n.*?<sup>(\w)</sup> [^\n]*no more often than chance", text, re.S
        )[1]
        marked = {row["model"]: f"<sup>{mark}</sup>" in row[column] for row in table(text, title)}
        assert marked.pop("b")
        assert not marked.pop("**ours**", False)
    assert "the rate of b; chosen by held-out videos" in text


def test_one_seed_is_said_to_tell_of_videos_alone():
    terms = study(seeds=(0,), rows=[{"name": "ours"}, {"name": "b"}])
    data = {"ours": [result(0, 50)], "b": [result(0, 90)]}
    text = markdown(summarise("models", terms, Recipe(), [OnData(facts(), data)]), COMMAND)
    assert "one seed: the interval and p are over videos alone" in text


def test_a_borrowed_rate_is_said_to_be_one():
    terms = study(rows=[{"name": "ours"}, {"name": "b", "lr_of": "ours"}])
    tuned = [TUNED[0], Tuned("b", "hard", 1e-3)]
    found = summarise("models", terms, Recipe(), [OnData(facts(), {})], tuned)
    text = markdown(found, COMMAND)
    assert "takes the rate of another" in text
    assert "not run yet" not in text
