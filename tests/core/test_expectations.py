"""``--expect`` is read as it is meant, or refused with the right spelling."""

from __future__ import annotations

import pytest

from ogreg_core.errors import UsageError
from ogreg_core.expectations import check_expectations, parse_expectation


@pytest.mark.parametrize(
    ("text", "figure", "low", "high"),
    [
        ("top1=78.8+-0.3", "top1", 78.5, 79.1),
        ("top1=78.8±0.3", "top1", 78.5, 79.1),
        ("top5 = 94 +/- 1", "top5", 93, 95),
        ("mean_class==5.+-.25", "mean_class", 4.75, 5.25),
        ("top1>=78.5", "top1", 78.5, 100),
        ("ece<=5", "ece", 0, 5),
    ],
)
def test_forms(text, figure, low, high):
    found = parse_expectation(text)
    assert (found.text, found.figure) == (text, figure)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    "text",
    ["", "top1", "top1=78.8", "top1>78", "top1=78.8+0.3", "top1=x+-1", "78.8+-0.3", "top1>=1e3"],
)
def test_refused_with_the_right_spelling(text):
    with pytest.raises(UsageError, match="cannot be read") as caught:
        parse_expectation(text)
    assert parse_expectation(caught.value.fix.split("'")[1]).low == pytest.approx(78.5)
    assert parse_expectation(caught.value.fix.split("'")[3]).low == 78.5


@pytest.mark.parametrize(
    ("text", "meant", "right"),
    [
        ("top1=0.788+-0.003", "78.8", "top1=78.8+-0.3"),
        (" top1 >= .785", "78.5", "top1 >= 78.5"),
        ("top5<=1", "100", "top5<=100"),
        ("mean_class=.5+-2", "50", "mean_class=50+-2"),
    ],
)
def test_shares_are_refused_with_the_percentage(text, meant, right):
    with pytest.raises(UsageError, match="is a share") as caught:
        parse_expectation(text)
    assert f"did you mean {meant}?" in caught.value.why
    assert caught.value.fix == f"--expect {right!r}"
    assert parse_expectation(right).low >= 0


@pytest.mark.parametrize("text", ["top1>=100.1", "ece<=788", "top1=788+-3", "top1=78+-300"])
def test_more_than_all_is_refused(text):
    with pytest.raises(UsageError, match="more than 100 percent"):
        parse_expectation(text)


def test_small_bounds_that_are_percentages():
    assert parse_expectation("ece<=0.8").high == 0.8
    assert parse_expectation("top5>=0").low == 0
    assert parse_expectation("top1=99.9+-0.3").high == pytest.approx(100.2)


def test_unknown_figures_get_the_nearest_name():
    with pytest.raises(UsageError, match="no figure 'topp1'") as caught:
        parse_expectation("topp1>=3")
    assert "'top1'" in caught.value.why
    with pytest.raises(UsageError) as caught:
        parse_expectation("wer<=3")
    assert "mean_class" in caught.value.why


def test_borders_belong_to_it_and_not_a_number_never_does():
    expectation = parse_expectation("top1=78.8+-0.3")
    # In binary 78.8 - 0.3 is above 78.5 by a hair, or below.
    assert all(expectation.met(value) for value in (78.5, 78.8, 79.1))
    assert not any(expectation.met(value) for value in (78.49, 79.11, float("nan")))
    outcome = check_expectations([expectation, parse_expectation("ece<=3")], {"top1": 1, "ece": 2})
    assert outcome == [
        {"expected": "top1=78.8+-0.3", "figure": "top1", "reached_pct": 1, "met": False},
        {"expected": "ece<=3", "figure": "ece", "reached_pct": 2, "met": True},
    ]
