"""``ogreg evidence`` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ogreg_core.evidence.study import builtin_studies
from tests.cli.test_errors import check
from tests.core.evidence.test_evidence_runner import RECIPE, STUDY, four_classes


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "shared.toml").write_text(RECIPE)
    path = tmp_path / "stems.toml"
    path.write_text(STUDY.replace("[1e-3, 2e-3]", "[1e-3]"))
    return path


def test_a_figure_is_repeated_by_an_ordinary_training(ogreg, study, demo_root, tmp_path):
    data = four_classes(tmp_path / "four", demo_root)
    out = tmp_path / "evidence"
    done = ogreg(
        *("evidence", study, data, "--out", out, "--rows", "conv", "--seeds", "1"),
        *("--jobs", "1", "--json"),
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "ogreg.evidence-report.v1"
    # Of a part of the study, which leaves the whole report alone.
    for name in ("stems-part.md", "stems-part.json", "stems-part.png", "results.jsonl"):
        assert (out / name).is_file()

    (run,) = (path for path in (out / "runs").glob("four-*/*") if path.name.endswith("seed1"))
    alone = ogreg(
        *("train", run / "recipe.toml", "--workers", "0", "--out", tmp_path / "alone"),
        OMP_NUM_THREADS="1",
    )
    assert alone.returncode == 0, alone.stderr
    ours, theirs = (
        load_file(folder / "checkpoints" / "last.safetensors")
        for folder in (run, tmp_path / "alone")
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)

    # --report trains nothing, not even what is missing.
    looked = ogreg("evidence", study, data, "--out", out, "--report")
    assert looked.returncode == 0, looked.stderr
    assert "patch" in looked.stdout
    assert (out / "stems.md").is_file()
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "d"], "there is no study"),
        (["models", "d", "--rows", "OG-Reg"], "did you mean 'OG-ReG'"),
        (["models", "d", "--seeds", "one"], "are no numbers"),
        (["models", "d", "--report", "--retry"], "exclude each other"),
    ],
)
def test_wrong_usage_is_refused(ogreg, arguments, words):
    check(ogreg("evidence", *arguments), 2, words)


def test_help_names_every_built_in_study(ogreg):
    words = ogreg("evidence", "--help").stdout.replace("\n", " ").split()
    assert {f"{name}," for name in builtin_studies()} <= set(words)
