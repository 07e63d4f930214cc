"""What results show: cells, differences, verdicts, and what is missing."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from ogreg_core.errors import DataError
from ogreg_core.evidence.results import Identity, Result
from ogreg_core.evidence.study import Row, Study
from ogreg_core.evidence.summary import DataFacts, Failure, Tuned, summarise

# A class called Tests would be taken for one.
from ogreg_core.evidence.summary import Tests as OnData
from ogreg_core.recipe import Recipe

VIDEOS = 200


def study(*names: str, seeds: tuple[int, ...] = (0, 1, 2), **more) -> Study:
    return Study(
        title="A study",
        recipe="base.toml",
        clips=4000,
        seeds=list(seeds),
        reference="ours",
        tuning={"lrs": [5e-4, 1e-3], "clips": 2000, **more},
        rows=[{"name": name} for name in ("ours", *names)],
    )


def facts(name: str = "first", videos: int = VIDEOS) -> DataFacts:
    return DataFacts(name, 8, 400, videos, "a" * 64, "b" * 64, 10)


def bits(right: int, videos: int = VIDEOS, shift: int = 0) -> str:
    text = "1" * right + "0" * (videos - right)
    return text[-shift:] + text[:-shift] if shift else text


def result(seed: int, right: str) -> Result:
    values = {
        **{"dataset": "first", "model": "ogreg-n", "changes": (), "lr": 1e-3, "clips": 4000},
        **{"status": "done", "seconds": 60.0 + seed, "params": 1_500_000, "gmacs": 0.25},
        "right": {
            "none": right,
            "shuffled": bits(30 + seed, len(right))[: len(right)],
            "middle": bits(20, len(right))[: len(right)],
        },
        "made": {"device": "cpu", "threads": 1},
    }
    return Result(Identity("e", "t", "v", seed), **values)


def failed(seed: int) -> Result:
    return replace(result(seed, ""), status="failed", reason="out of memory", right={})


def three(right: int, videos: int = VIDEOS) -> list[Result]:
    return [result(seed, bits(right + seed - 1, videos)) for seed in (0, 1, 2)]


def summary(*rights: dict[str, int], seeds=(0, 1, 2), videos: int = VIDEOS):
    """Of a number of right videos by row, on each data set."""
    names = [name for name in rights[0] if name != "ours"]
    tests = [
        OnData(facts(f"set{i}", videos), {row: three(n, videos) for row, n in right.items()})
        for i, right in enumerate(rights)
    ]
    return summarise("study", study(*names, seeds=seeds), Recipe(), tests)


def test_a_cell_has_the_figures_of_its_results():
    rows = {"ours": three(100), "other": [result(2, bits(90)), result(0, bits(84))]}
    found = summarise("study", study("other"), Recipe(), [OnData(facts(), rows)])
    ours, other = found.cells
    assert (ours.row, ours.dataset, ours.model, ours.lr) == ("ours", "first", "ogreg-n", 1e-3)
    assert ours.top1s == {0: 49.5, 1: 50.0, 2: 50.5}
    # 4.3027 * 0.5 / sqrt(3)
    assert (ours.mean, ours.low, ours.high) == pytest.approx((50, 48.7579, 51.2421), abs=1e-4)
    assert ours.controls == pytest.approx({"shuffled": 15.5, "middle": 10})
    assert (ours.seconds, ours.gmacs, ours.params) == (61, 0.25, 1_500_000)
    assert ours.difference is None
    assert ours.missing == {}
    # In the order of the seeds, and the difference over those of both.
    assert list(other.top1s.items()) == [(0, 42.0), (2, 45.0)]
    assert other.missing == {1: "not finished yet"}
    assert other.difference.seeds == (0, 2)
    assert other.difference.points == pytest.approx(43.5 - 50)
    assert found.machines == ("cpu, 1 thread",)
    assert found.cell("other", "first") is other


def test_a_machine_is_named_once_with_every_version_of_the_code():
    codes = ("1234abcd" + "0" * 56, "ffff0000" + "0" * 56)
    made = [{"source": codes[0]}, {"source": codes[1]}, {"source": codes[0], "device": "cuda"}]
    rows = [
        replace(item, made={**item.made, **more})
        for item, more in zip(three(100), made, strict=True)
    ]
    found = summarise("study", study(), Recipe(), [OnData(facts(), {"ours": rows})])
    assert found.machines == (
        "cpu, 1 thread, code 1234abcd ffff0000",
        "cuda, 1 thread, code 1234abcd",
    )


def test_results_of_other_seeds_do_not_count():
    rows = {"ours": [*three(100), result(9, bits(0))]}
    found = summarise("study", study(), Recipe(), [OnData(facts(), rows)])
    assert found.cells[0].mean == pytest.approx(50)
    one = summarise("study", study(seeds=(1,)), Recipe(), [OnData(facts(), rows)]).cells[0]
    assert (one.mean, one.low, one.high) == (50.0, None, None)


def test_intervals_stay_among_the_percents():
    rows = {"ours": [result(s, bits(right)) for s, right in enumerate((150, 195, 199))]}
    cell = summarise("study", study(), Recipe(), [OnData(facts(), rows)]).cells[0]
    assert cell.high == 100
    rows = {"ours": [result(s, bits(right)) for s, right in enumerate((50, 5, 1))]}
    assert summarise("study", study(), Recipe(), [OnData(facts(), rows)]).cells[0].low == 0


@pytest.mark.parametrize(
    ("sets", "word", "why"),
    [
        ([{"ours": 80, "other": 120}, {"ours": 100, "other": 140}], "better", ""),
        ([{"ours": 120, "other": 80}], "worse", "on set0 alone"),
        (
            [{"ours": 120, "other": 80}, {"ours": 100, "other": 30}],
            "worse",
            "other is at chance on set1 after this budget",
        ),
        (
            [{"ours": 25, "other": 80}, {"ours": 25, "other": 90}],
            "better",
            "ours is at chance on set0, set1 after this budget",
        ),
        ([{"ours": 100, "other": 100}, {"ours": 80, "other": 80}], "no clear difference", ""),
        (
            [{"ours": 80, "other": 120}, {"ours": 120, "other": 80}],
            "not settled",
            "better on one data set, worse on another",
        ),
        (
            [{"ours": 80, "other": 120}, {"ours": 100, "other": 100}],
            "not settled",
            "clear on set0, not on set1",
        ),
    ],
)
def test_verdicts_need_every_data_set(sets, word, why):
    (verdict,) = summary(*sets).verdicts
    assert (verdict.row, verdict.word, verdict.why) == ("other", word, why)


def test_a_grid_that_failed_as_a_whole_is_told():
    rates = study("other").tuning.lrs
    hopeless = Tuned("other", "first", None, dict.fromkeys(rates))
    tests = [OnData(facts(), {"ours": three(90)})]
    found = summarise("study", study("other"), Recipe(), tests, [hopeless])
    why = dict.fromkeys((0, 1, 2), "cannot start: no rate of the grid could be trained")
    assert found.cell("other", "first").missing == why
    # Nor can a row that takes its rate.
    third = Row(name="third", lr_of="other")
    borrowing = study("other").model_copy(update={"rows": [*study("other").rows, third]})
    found = summarise("study", borrowing, Recipe(), tests, [hopeless])
    assert found.cell("third", "first").missing == why


def test_a_wide_interval_settles_nothing():
    """Few videos, on which the two are right in turns: no difference, nor the lack of one."""
    rows = {
        "ours": [result(seed, "10" * 10) for seed in range(3)],
        "other": [result(seed, "01" * 10) for seed in range(3)],
    }
    found = summarise("study", study("other"), Recipe(), [OnData(facts(videos=20), rows)])
    difference = found.cells[1].difference
    assert difference.points == 0
    assert difference.p == 1
    assert difference.low < -5
    assert found.verdicts[0].word == "not settled"
    assert found.verdicts[0].why == "neither clear nor within ±5 points"


def test_what_is_missing_leaves_it_open():
    clear = {"ours": three(60), "other": three(150)}
    lacking = {**clear, "other": [*three(150)[:2], failed(2)]}
    for rows, row in ((lacking, "other"), ({**clear, "ours": three(60)[1:]}, "ours")):
        found = summarise("study", study("other"), Recipe(), [OnData(facts(), rows)])
        assert found.cells[1].difference.is_clear
        assert found.verdicts[0].word == "not settled"
        assert found.verdicts[0].why == f"{row} lacks seeds on first"


@pytest.mark.parametrize("seeds", [(1,), (0, 2)])
def test_few_seeds_leave_it_open(seeds):
    (verdict,) = summary({"ours": 60, "other": 150}, seeds=seeds).verdicts
    assert (verdict.word, verdict.why) == ("not settled", "fewer than 3 seeds")


def test_chance_is_a_one_sided_binomial_test():
    """Of 200 videos of 8 classes 25 are right by chance, 33 or more in 5.8 % of draws, 34 in 3.9 %."""
    rows = {"ours": [result(seed, bits(right)) for seed, right in enumerate((25, 33, 34))]}
    (cell,) = summarise("study", study(), Recipe(), [OnData(facts(), rows)]).cells
    assert cell.at_chance == (0, 1)
    assert cell.has_learnt


def test_a_judged_control_has_a_verdict_of_its_own():
    rows = {"ours": three(60), "other": three(150)}
    for results in rows.values():
        for given in results:
            # The other way round than on the plain frames.
            given.right["half"] = bits(200 - given.right["none"].count("1"))
    terms = study("other").model_copy(update={"controls": ["half"], "judged": ["half"]})
    found = summarise("study", terms, Recipe(), [OnData(facts(), rows), OnData(facts("b"), rows)])
    words = {verdict.control: verdict.word for verdict in found.verdicts}
    assert words == {"none": "better", "half": "worse"}
    cell = found.cell("other", "b")
    assert cell.judged["half"].points == pytest.approx(-45)
    assert cell.difference.points == pytest.approx(45)
    # Those that were not tested so leave it open.
    del rows["other"][1].right["half"]
    found = summarise("study", terms, Recipe(), [OnData(facts(), rows)])
    assert found.verdicts[1].why == "fewer than 3 seeds"


def test_a_pair_has_a_verdict_of_its_own():
    """Worse than the reference, better than the row of its stem."""
    rows = {"ours": three(150), "stem": three(40), "other": three(90)}
    terms = study("stem", "other")
    paired = terms.row("other").model_copy(update={"against": "stem"})
    terms = terms.model_copy(update={"rows": [*terms.rows[:2], paired]})
    tests = [OnData(facts(name), rows) for name in ("a", "b")]
    found = summarise("study", terms, Recipe(), tests)
    words = {(verdict.row, verdict.against): verdict.word for verdict in found.verdicts}
    assert words == {
        ("stem", "ours"): "worse",
        ("other", "ours"): "worse",
        ("other", "stem"): "better",
    }
    assert found.verdicts[-1].differences["b"].points == pytest.approx(25)
    assert found.cell("other", "b").paired == found.verdicts[-1].differences["b"]
    # The partner's caveats, not the reference's, and what it lacks.
    rows["stem"] = [result(seed, bits(5)) for seed in range(3)]
    found = summarise("study", terms, Recipe(), tests)
    assert found.verdicts[-1].why == "stem is at chance on a, b after this budget"
    del rows["stem"][0]
    found = summarise("study", terms, Recipe(), tests)
    assert found.verdicts[-1].why == "stem lacks seeds on a"
    # A part of the study without the partner has no pair.
    part = terms.model_copy(update={"rows": [terms.rows[0], terms.rows[2]]})
    found = summarise("study", part, Recipe(), tests)
    assert [verdict.against for verdict in found.verdicts] == ["ours"]


def test_without_the_reference_there_are_no_differences():
    reduced = study("other").model_copy(update={"rows": study("other").rows[1:]})
    tests = [OnData(facts(), {"other": three(90)})]
    found = summarise("study", reduced, Recipe(), tests)
    assert found.cells[0].difference is None
    assert found.verdicts[0].why == "the reference was not asked for, not trained, or not tested so"


def test_failures_are_listed_once():
    rows = {"ours": [failed(1), *three(100)[::2]]}
    tuning = Failure("ours", "first-tuning", 100, 1e-3, "diverged")
    test = Failure("ours", "first", 1, 1e-3, "out of memory")
    found = summarise("study", study(), Recipe(), [OnData(facts(), rows)], (), [tuning])
    assert found.failures == (tuning, test)
    again = summarise("study", study(), Recipe(), [OnData(facts(), rows)], (), [tuning, test])
    assert again.failures == found.failures
    assert found.cells[0].missing == {1: "failed: out of memory"}


def test_a_rate_is_known_before_the_first_result():
    tuned = [Tuned("ours", "first", 5e-4, {5e-4: 40.0, 1e-3: None})]
    tests = [OnData(facts("first"), {}), OnData(facts("second"), {})]
    for each, rates in ((False, [5e-4, 5e-4]), (True, [5e-4, None])):
        found = summarise("study", study(each=each), Recipe(), tests, tuned)
        assert [cell.lr for cell in found.cells] == rates
        assert [cell.mean for cell in found.cells] == [None, None]
        assert set(found.cells[0].missing) == {0, 1, 2}


def test_results_of_other_videos_are_refused():
    tests = [OnData(facts(videos=VIDEOS + 1), {"ours": three(100)})]
    with pytest.raises(DataError, match="not of the data set first") as caught:
        summarise("study", study(), Recipe(), tests)
    assert "200" in str(caught.value.where)
    assert "201" in str(caught.value.why)


def test_the_document_is_plain():
    found = summary({"ours": 80, "other": 120}, {"ours": 80, "other": 120})
    text = json.dumps(found.document("ogreg evidence study first"), allow_nan=False)
    document = json.loads(text)
    assert document["schema"] == "ogreg.evidence-report.v1"
    assert document["command"] == "ogreg evidence study first"
    assert [cell["row"] for cell in document["cells"]] == ["ours", "other"] * 2
    assert document["cells"][1]["difference"]["points"] == pytest.approx(20)
    assert document["data"][0]["chance_pct"] == 12.5
    assert document["verdicts"][0]["word"] == "better"
    assert document["study"]["seeds"] == [0, 1, 2]
    assert not any(math.isnan(cell["mean"]) for cell in document["cells"])
