"""The benchmarks run, count what they say they count, and keep a record that stays readable."""

from __future__ import annotations

import importlib
import json
import math
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks import mdconv, models, record
from tests.benchmarks.products import Product, products_of, replay

CPU = torch.device("cpu")
FOLDER = Path(record.__file__).parent


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_benchmark_can_be_imported(name):
    module = importlib.import_module(f"tests.benchmarks.{name}")
    assert module.__doc__
    if name not in ("record", "products"):
        assert callable(module.main)
        assert f"tests/benchmarks/{name}.py" in module.__doc__


def test_a_run_is_appended_as_one_line_and_those_before_stay(tmp_path, capsys):
    options = record.build_parser("x", 3).parse_args(["--append", str(tmp_path / "b.jsonl")])
    for value in (1.5, 2.5):
        record.finish("some", options, [{"way": "a", "ms_p50": value}, {"way": "b", "times": 2}])
    lines = (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    assert [document["results"][0]["ms_p50"] for document in documents] == [1.5, 2.5]
    last = documents[-1]
    assert last["options"] == {"repeats": 3}
    assert last["machine"]["torch"] == torch.__version__
    assert last["machine"]["threads"] == torch.get_num_threads()
    assert capsys.readouterr().out.splitlines()[-2:] == ["a       2.5", "b                2"]


def test_processes_are_timed_and_may_time_themselves():
    code = "import time; s = time.process_time()\nwhile time.process_time() < s + 0.3: pass\n"
    commands = {
        "busy": [sys.executable, "-c", code],
        "idle": [sys.executable, "-c", "import time; time.sleep(0.2)"],
        "own": [sys.executable, "-c", "print(7.0, 3.0)"],
    }
    found = record.process_medians(commands, repeats=1, self_timed=["own"])
    assert found["own"] == (7.0, 3.0)
    # The system counts a child's processor time in ticks of 10 ms.
    assert found["busy"].processor > 0.25
    assert found["idle"].wall >= 0.2
    assert found["idle"].processor < 0.15


class Mixed(nn.Module):
    """One product of every kind, and what is none."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Conv3d(3, 8, (1, 4, 4), stride=(1, 4, 4))
        self.depthwise = nn.Conv3d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv3d(8, 8, 1, groups=2)
        self.linear = nn.Linear(8, 24)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.depthwise(self.dense(clip)))
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = self.linear(tokens).reshape(2, 8, 2, 12).transpose(1, 2).chunk(3, -1)
        out = F.scaled_dot_product_attention(query, key, value)
        return torch.bmm(out.flatten(0, 1), out.flatten(0, 1).transpose(1, 2))


def test_products_are_found_with_their_shapes():
    found = products_of(Mixed().eval(), torch.randn(2, 3, 2, 8, 8))
    fp32 = torch.float32
    assert found == {
        Product(1, 16, 48, 8, fp32): 1,  # 2 x 2 x 2 x 2 positions, 3 x 4 x 4 inputs
        Product(2, 16, 4, 4, fp32): 1,
        Product(1, 16, 8, 24, fp32): 1,
        Product(4, 8, 4, 8, fp32): 2,  # queries by keys; the product at the end
        Product(4, 8, 8, 4, fp32): 1,
    }


def test_a_replayed_product_has_its_shape_and_its_memory():
    for product in (Product(1, 5, 3, 4, torch.float32), Product(2, 5, 3, 4, torch.float32)):
        call = replay(product, CPU)
        out = call()
        assert out.numel() == product.batch * 5 * 4
        assert call() is out
        left, right = call.args
        torch.testing.assert_close(out, left @ right)


def test_models_in_turn():
    options = Namespace(
        models="ogreg-n,ogreg-t", frames=[2], size=32, dtype="fp32", best_batch=False, repeats=1
    )
    rows = models.run(options, CPU)
    assert [row["what"] for row in rows].count("training step") == 2
    for row in rows:
        assert row["ms_p50"] > 0
        if row["what"] == "inference" and row["model"] == "ogreg-t":
            assert row["times_first"] == pytest.approx(row["ms_p50"] / rows[0]["ms_p50"])
        if "products" in row:
            assert row["times_products"] == pytest.approx(row["ms_p50"] / row["products_ms"])


def test_the_best_batch_is_the_one_with_the_most_clips_per_second(monkeypatch):
    speeds = {1: 10.0, 2: 12.0, 4: 20.0, 8: 41.0}
    bench = models.Bench(["ogreg-n"], 2, 32, CPU, "fp32")

    def measure(run, *_arguments, **_settings):
        return Namespace(median_ms=speeds[len(run.args[1])])

    monkeypatch.setattr(models, "measure", measure)
    best = models.best_batch(bench, "ogreg-n", 1)
    assert (best["batch"], best["clips_per_s"]) == (4, 200.0)


def test_mdconv_stages_and_rows():
    options = Namespace(frames=4, size=32, batch=1, dtype="fp32", repeats=1)
    rows = mdconv.run(options, CPU)
    assert {row["shape"] for row in rows} == {
        "1x2x8x8x96",
        "1x2x4x4x192",
        "1x2x2x2x384",
        "1x2x1x1x768",
    }
    assert len(rows) == 4 * 2 * 3
    for row in rows:
        assert row["ms_p50"] > 0
        assert math.isfinite(row["times_floor"])
        assert row["way"] != "MDConv" or row["times_MDConv"] == 1


def test_mdconv_that_computes_something_else_is_not_compared():
    ways = mdconv.ways_at(8, CPU, torch.float32)
    y = torch.randn(1, 3, 4, 4, 8)
    mdconv.check_agreement(ways, y)
    with pytest.raises(AssertionError):
        mdconv.check_agreement({**ways, "plain": ways["depthwise conv3d"]}, y)
