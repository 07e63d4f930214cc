"""The record of a study's trainings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ogreg_core.errors import DataError
from ogreg_core.evidence.results import Identity, Result, append_result, latest, read_results

DONE = Result(
    Identity("e", "t", "v", 0),
    "demo",
    "ogreg-n",
    ("model.name=ogreg-n",),
    1e-3,
    clips=40,
    status="done",
    seconds=1.5,
    right={"none": "1101", "shuffled": "1000", "middle": "0000"},
)


def test_what_is_written_is_read_again(tmp_path):
    file = tmp_path / "results.jsonl"
    failed = replace(DONE, status="failed", reason="ValueError: größer\u2028 \x1e", right={})
    for result in (failed, DONE):
        append_result(file, result)
    assert read_results(file) == [failed, DONE]
    assert latest(read_results(file)) == {DONE.identity: DONE}
    # A score stays, whatever becomes of a later try.
    assert latest([DONE, failed]) == {DONE.identity: DONE}
    again = replace(DONE, lr=2e-3)
    assert latest([DONE, again]) == {DONE.identity: again}
    assert DONE.top1() == 75.0
    assert DONE.top1("middle") == 0.0
    assert read_results(tmp_path / "none.jsonl") == []


def test_a_line_that_a_kill_cut_off_is_left_out_and_another_broken_one_is_not(tmp_path):
    file = tmp_path / "results.jsonl"
    append_result(file, DONE)
    whole = file.read_text()
    file.write_text(whole + whole[:50])
    assert read_results(file) == [DONE]
    append_result(file, replace(DONE, lr=2e-3))
    assert [result.lr for result in read_results(file)] == [1e-3, 2e-3]
    file.write_text("{}\n" + whole)
    with pytest.raises(DataError, match="line 1"):
        read_results(file)
