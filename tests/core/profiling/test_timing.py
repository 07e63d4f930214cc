from __future__ import annotations

import pytest
import torch

from ogreg_core.profiling import measure, measure_in_turn
from ogreg_core.profiling.timing import OperatorTime, matrix_product_share, operator_times

CPU = torch.device("cpu")


class Clock:
    """Moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_functions_are_timed_in_turn():
    calls, seen = [], []
    functions = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = measure_in_turn(functions, CPU, 3, 1, lambda event: seen.append(event.done))
    assert "".join(calls) == "abababab"
    assert seen == list(range(1, 9))
    assert [(name, timing.repeats, timing.warmup) for name, timing in found.items()] == [
        ("a", 3, 1),
        ("b", 3, 1),
    ]


def test_median_and_ninth_decile_after_the_warm_up():
    clock = Clock()
    seconds = iter([50.0, 60.0, *(n / 1000 for n in (7, 1, 10, 3, 2, 9, 4, 5, 8, 6))])

    def work():
        clock.now += next(seconds)

    found = measure(work, CPU, repeats=10, warmup=2, clock=clock)
    assert found.median_ms == pytest.approx(5.5)
    assert found.p90_ms == pytest.approx(9)
    assert (found.repeats, found.warmup) == (10, 2)


def test_one_repeat_is_its_own_decile():
    clock = Clock()

    def work():
        clock.now += 0.25

    found = measure(work, CPU, repeats=1, warmup=0, clock=clock)
    assert (found.median_ms, found.p90_ms) == (250, 250)


def test_operators_by_their_own_time(capfd):
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    weight = torch.randn(8, 3, 3, 3)

    def work():
        torch.nn.functional.conv2d(torch.randn(1, 3, 64, 64), weight)
        return torch.relu(a @ b)

    work()
    found = operator_times(work, CPU)
    calls = {operator.name: operator.calls for operator in found}
    assert calls["aten::mm"] == 1
    assert [o.ms for o in found] == sorted((o.ms for o in found), reverse=True)
    assert sum(o.share for o in found) == pytest.approx(1)
    share = sum(o.share for o in found if o.name in ("aten::mm", "aten::mkldnn_convolution"))
    assert share > 0
    assert matrix_product_share(found) >= share
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("aten::addmm", True),
        ("aten::bmm", True),
        ("aten::mkldnn_convolution", True),
        ("aten::cudnn_convolution", True),
        ("aten::_conv_depthwise2d", True),
        ("aten::conv_depthwise3d", True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", True),
        ("aten::_efficient_attention_forward", True),
        ("mkldnn::_linear_pointwise", True),
        ("aten::mul", False),
        ("aten::gelu", False),
        ("aten::convert", False),
        ("aten::sum", False),
        ("aten::native_layer_norm", False),
        ("aten::_softmax", False),
    ],
)
def test_what_is_a_matrix_product(name, counts):
    assert matrix_product_share([OperatorTime(name, 1, 1.0, 0.5)]) == (0.5 if counts else 0)
