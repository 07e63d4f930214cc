"""The garbage collector rests while torch is imported, and is as before afterwards."""

from __future__ import annotations

import gc
import sys

import pytest

from ogreg_cli.imports import uncollected


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    # With it in memory nothing is frozen; another test may have imported it.
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_meanwhile_nor_looked_through_afterwards():
    frozen = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        kept = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept)
    assert not any(item is kept for item in gc.get_objects())


def test_after_an_error_it_collects_again():
    with pytest.raises(ImportError, match="torch"), uncollected():
        raise ImportError("no torch")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_beside_triton_nothing_is_frozen(monkeypatch):
    """What is not collected at the end its bindings call leaks, on the terminal."""
    monkeypatch.setitem(sys.modules, "triton", sys)
    frozen = gc.get_freeze_count()
    with uncollected():
        pass
    assert gc.get_freeze_count() == frozen
