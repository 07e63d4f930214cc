"""MDConv's kernels without a GPU: their arithmetic in Triton's interpreter beside the plain path in
float64, their compilation for two GPUs with Triton's own assembler, and the choice between the two.

The interpreter is chosen by a variable that is read when triton is imported: this file runs itself
in processes of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ogreg_core.errors import EnvironmentFault, UsageError
from ogreg_core.models.kernels import mdconv
from ogreg_core.models.mdconv import frame_dissimilarity, modulated_conv, modulation

NAMES = ("gaze", "y", "weight", "bias", "sharpness", "offset")


def parameters(channels: int) -> list[Tensor]:
    weight = 0.3 * torch.randn(channels, 1, 3, 3, 3)
    return [
        weight,
        torch.randn(channels),
        4 + torch.randn(channels),
        torch.randn(channels) - 2,
    ]


def plain(y: Tensor, weight: Tensor, bias: Tensor, sharpness: Tensor, offset: Tensor) -> Tensor:
    m = None if y.shape[1] == 1 else modulation(frame_dissimilarity(y), sharpness, offset)
    return modulated_conv(y, weight, m, bias)


def results(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The Gaze, then the gradient of each input; zero where it has none."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    pairs = zip(gradients, leaves, strict=True)
    return [out, *(torch.zeros_like(x) if g is None else g for g, x in pairs)]


def errors(y: Tensor, result: torch.dtype | None = None) -> dict[str, float]:
    """Largest difference over the largest value of the reference, but at least over 0.1 % of all."""
    result = result or y.dtype
    inputs = [y, *parameters(y.shape[-1])]
    grad = torch.randn(y.shape).to(result)
    ours = results(lambda *x: torch.ops.ogreg.mdconv(*x, result)[0], inputs, grad)
    exact = results(plain, [tensor.double() for tensor in inputs], grad.double())
    return {
        name: ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)).item()
        for name, a, b in zip(NAMES, ours, exact, strict=True)
    }


# --- run in the interpreter --------------------------------------------------------------------


def set_tiles(positions: int, channels: int, programs: int = 4096) -> None:
    """An interpreted program takes the same time however large it is: few large ones are faster."""
    from ogreg_core.models.kernels import mdconv_backward, mdconv_forward

    tile = mdconv_forward.Tile(positions, channels, 4)
    mdconv_forward.GAZE_TILE = mdconv_forward.DISSIMILARITY_TILE = tile
    mdconv_backward.PARAMETER_TILE = mdconv_backward.FEATURE_TILE = tile
    mdconv_forward.PROGRAMS = mdconv_backward.PROGRAMS = programs


def without_wrappers() -> None:
    """The parts of the kernels as plain functions: the interpreter takes a millisecond to call one."""
    from ogreg_core.models.kernels import mdconv_backward, mdconv_forward

    names = ("before", "channels_of", "mask_of", "opening", "place_of")
    for module in (mdconv_backward, mdconv_forward):
        for name in names:
            setattr(module, name, getattr(module, name).fn)


def of_many_shapes() -> dict[str, dict[str, float]]:
    found = {"narrow tiles": errors(torch.randn(1, 2, 3, 2, 33))}
    set_tiles(16, 1024)
    shapes = [(1, 3, 2, 2, 96), (1, 2, 2, 1, 192), (1, 2, 1, 2, 384), (1, 2, 1, 1, 768)]
    shapes += [(2, 3, 3, 5, 8), (2, 1, 2, 3, 8)]
    return {**found, **{str(shape): errors(torch.randn(shape)) for shape in shapes}}


def of_special_features() -> dict[str, dict[str, float]]:
    set_tiles(64, 256)
    still = torch.randn(1, 1, 3, 4, 8).expand(-1, 3, -1, -1, -1).contiguous()
    small = torch.randn(1, 3, 3, 4, 8)
    small[:, :2, 0] *= 1e-10
    small[:, 1, 1:] = 0.0
    found = torch.ops.ogreg.mdconv(still, *parameters(8), torch.float32)
    return {
        "still dissimilarity": {"largest": found[1].abs().max().item()},
        "still": errors(still),
        "zeros among others, and norms below the least": errors(small),
        "all zeros": errors(torch.zeros(1, 2, 2, 2, 8)),
    }


def of_all_dtypes() -> dict[str, dict[str, float]]:
    set_tiles(64, 256)
    y = torch.randn(1, 2, 3, 4, 24)
    half = {str(kind): errors(y.to(kind)) for kind in (torch.bfloat16, torch.float16)}
    return {**half, "mixed": errors(y, torch.bfloat16)}


def in_pieces() -> dict[str, object]:
    """Several tiles per program, walks in several pieces, and the same bits twice."""
    from ogreg_core.models.kernels.mdconv_forward import span_of

    y, grad = torch.randn(1, 8, 2, 2, 8), torch.randn(1, 8, 2, 2, 8)
    inputs = [y, *parameters(8)]

    def run() -> list[Tensor]:
        return results(lambda *x: torch.ops.ogreg.mdconv(*x, y.dtype)[0], inputs, grad)

    exact = results(plain, [tensor.double() for tensor in inputs], grad.double())

    def error(found: list[Tensor]) -> float:
        return max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True))

    set_tiles(4, 8, programs=4)
    first, again, long_walk = run(), run(), span_of(8, 4)
    set_tiles(4, 8)
    return {
        "same bits": all(map(torch.equal, first, again)),
        "spans": [long_walk, span_of(8, 4)],
        "errors": [error(first), error(run())],
    }


def arithmetic() -> dict[str, object]:
    return {part.__name__: part() for part in (of_many_shapes, of_special_features, of_all_dtypes)}


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(parameters(channels))

    def forward(self, y: Tensor) -> Tensor:
        y = torch.sin(y)
        path = mdconv.gaze if mdconv.can_use(y) else plain
        return path(y, *self.parts).relu()


def through_torch() -> dict[str, object]:
    """Registration, compilation in one graph, autocast, checkpointing, export."""
    set_tiles(64, 64)
    y, (weight, *vectors) = torch.randn(1, 2, 1, 2, 4, requires_grad=True), parameters(4)
    inputs = [weight, *vectors]
    for tensor in inputs:
        tensor.requires_grad_()
    outs = torch.ops.ogreg.mdconv(y, *inputs, torch.float32)
    detached = [tensor.detach() for tensor in (outs[0], y, *inputs, *outs[1:])]
    checks = {
        **torch.library.opcheck(torch.ops.ogreg.mdconv.default, (y, *inputs, torch.float32)),
        **torch.library.opcheck(torch.ops.ogreg.mdconv_backward.default, tuple(detached)),
    }

    # The interpreter in the place of a GPU.
    mdconv._DEVICES = ("cpu",)
    # The real check, inside activation checkpointing, as in the first step of a training.
    mdconv._usable = lambda *_: mdconv._passes(
        torch.device("cpu"), torch.float32, torch.float32, y.shape[-1]
    )
    first = torch.autograd.grad(checkpoint(Net(4), y, use_reentrant=False).sum(), y)
    mdconv._usable = mdconv._constant_in_graphs(lambda *_: True)
    net, grad = Net(4), torch.randn(1, 2, 1, 2, 4)
    inputs = [y, *net.parts]

    def gradients(function) -> list[Tensor]:
        out = function(y)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    eager = gradients(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(net, (y.detach(),))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, compiled_mixed = net(y), compiled(y)
    return {
        "checks": checks,
        "compiled": all(map(torch.equal, eager, gradients(compiled))),
        "checkpointed": all(
            map(torch.equal, eager, gradients(lambda x: checkpoint(net, x, use_reentrant=False)))
        ),
        "mixed": [str(mixed.dtype), torch.equal(mixed, compiled_mixed)],
        "exported without the operator": "mdconv" not in str(exported.graph),
        "exported is right": torch.allclose(exported.module()(y), eager[0], atol=1e-5),
        "traced without the operator": "ogreg::mdconv"
        not in str(torch.jit.trace(net, y, check_trace=False).graph),
        "checked inside of checkpointing": bool(first[0].isfinite().all()),
        "self-check": mdconv.relative_errors(torch.device("cpu"), torch.float32, torch.float32, 8),
    }


# --- arithmetic --------------------------------------------------------------------------------


def interpreted(function) -> dict:
    """What a function of this file returns in a process of its own, with the interpreter."""
    done = subprocess.run(
        [sys.executable, __file__, function.__name__],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this system")
class TestArithmetic:
    @pytest.mark.slow
    def test_equals_the_plain_path_in_float64(self):
        found = interpreted(arithmetic)
        assert found["of_special_features"].pop("still dissimilarity") == {"largest": 0.0}
        # Half precision rounds what is stored, and no sums.
        rounded = {
            "mixed": {"gaze"},
            "torch.bfloat16": {"gaze", "y"},
            "torch.float16": {"gaze", "y"},
        }
        for part, cases in found.items():
            for case, each in cases.items():
                assert list(each) == list(NAMES)
                for name, error in each.items():
                    limit = 8e-3 if name in rounded.get(case, ()) else 2e-5
                    assert error < limit, (part, case, name)

    def test_programs_and_walks_can_be_cut_anywhere(self):
        found = interpreted(in_pieces)
        assert found["same bits"]
        assert found["spans"] == [8, 4]
        assert max(found["errors"]) < 2e-4

    @pytest.mark.slow
    def test_is_an_operator_like_torchs_own(self):
        found = interpreted(through_torch)
        assert set(found["checks"].values()) == {"SUCCESS"}
        assert found["compiled"]
        assert found["checkpointed"]
        assert found["checked inside of checkpointing"]
        assert found["mixed"] == ["torch.bfloat16", True]
        assert found["exported without the operator"]
        assert found["exported is right"]
        assert found["traced without the operator"]
        assert len(found["self-check"]) == 6
        assert max(found["self-check"].values()) < 1e-5


# --- compilation -------------------------------------------------------------------------------


def kernels(channels: int, features: str, result: str) -> list[tuple]:
    """Kernel, dtypes of its pointers that are not float32, constants, warps."""
    from ogreg_core.models.kernels import mdconv_backward as back
    from ogreg_core.models.kernels import mdconv_forward as front

    def sizes(tile) -> dict[str, int]:
        return {"channels": channels, "block_p": tile.positions, "block_c": tile.channels}

    first, gaze = front.DISSIMILARITY_TILE, front.GAZE_TILE
    sums, last = back.PARAMETER_TILE, back.FEATURE_TILE
    least, rows = {"least": front.EPSILON}, {"rows": front.ROWS}
    both = {"grad": result, "y": features}
    parts = 3 * -(-channels // sums.channels)
    return [
        (front.dissimilarity_kernel, {"y": features}, sizes(first) | least, first.warps),
        (front.gaze_kernel, {"y": features, "out": result}, sizes(gaze) | rows, gaze.warps),
        (back.parameter_kernel, both, sizes(sums) | rows, sums.warps),
        (back.cosine_kernel, {}, {"parts": parts, "block_p": 128} | least, 4),
        (back.feature_kernel, both | {"out": features}, sizes(last) | rows, last.warps),
    ]


INTEGERS = {"batches", "frames", "positions", "height", "width", "span"}


def cubin(kernel, pointers: dict[str, str], constants: dict, warps: int, capability: int) -> bytes:
    """Machine code for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        return "i32" if name in INTEGERS else "*" + pointers.get(name, "fp32")

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if kind(name).startswith("*")
        },
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).asm["cubin"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this system")
@pytest.mark.parametrize(
    ("capability", "channels", "features", "result"),
    [(90, 96, "fp32", "bf16"), (80, 768, "bf16", "bf16")],
)
def test_compiles_without_spilling(capability, channels, features, result, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, *rest in kernels(channels, features, result):
        path = tmp_path / "kernel.cubin"
        path.write_bytes(cubin(kernel, *rest, capability))
        assert path.stat().st_size > 1000
        if tool.exists():
            usage = subprocess.run(
                [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
            ).stdout
            registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
            # Room for three programs of four warps; a spill would be hundreds of bytes (one version
            # of the assembler puts 8 aside).
            assert registers <= 168, (kernel.__name__, usage)
            assert stack <= 16, (kernel.__name__, usage)


# --- the choice --------------------------------------------------------------------------------

Y = torch.zeros(1, 2, 3, 3, 4)
KEY = ("auto", 0, torch.float32, torch.bfloat16)


@pytest.fixture
def able(monkeypatch):
    """A CUDA device on which nothing has been tried yet."""
    monkeypatch.setattr(mdconv, "_obstacle", lambda *_: "")
    monkeypatch.setattr(mdconv, "_verdicts", {})
    monkeypatch.setattr(mdconv, "_failed", set())


class TestChoice:
    def test_cpu_takes_the_plain_path_and_imports_no_triton(self):
        code = (
            "import sys, torch\n"
            "from ogreg_core.models.kernels.mdconv import can_use\n"
            "print(can_use(torch.zeros(1, 2, 3, 3, 4)))\n"
            "print([name for name in sys.modules if name.endswith(('_forward', '_backward'))\n"
            "       and 'ogreg' in name], 'triton' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["False", "[]", "False"], done.stderr

    @pytest.mark.parametrize("value", ["auto", "plain", "triton"])
    def test_cpu_takes_the_plain_path_whatever_is_asked_for(self, value, monkeypatch):
        monkeypatch.setenv("OGREG_KERNELS", value)
        assert not mdconv.can_use(Y)

    def test_unknown_value_is_refused(self, monkeypatch):
        monkeypatch.setenv("OGREG_KERNELS", "cuda")
        with pytest.raises(UsageError, match="auto, plain, triton") as caught:
            mdconv.can_use(Y)
        assert caught.value.fix == "unset OGREG_KERNELS"

    @pytest.mark.parametrize(
        ("value", "y", "expected"),
        [
            ("auto", Y, True),
            ("auto", Y.half(), True),
            ("auto", Y.double(), False),
            ("auto", Y[:0], False),
            ("plain", Y, False),
        ],
    )
    def test_value_dtype_and_size_decide(self, value, y, expected, monkeypatch):
        monkeypatch.setattr(mdconv, "_DEVICES", ("cpu",))
        monkeypatch.setattr(mdconv, "_usable", lambda *_: True)
        monkeypatch.setenv("OGREG_KERNELS", value)
        assert mdconv.can_use(y) is expected

    def test_good_check_is_made_once_per_width(self, able, monkeypatch):
        made = []
        monkeypatch.setattr(mdconv, "relative_errors", lambda *key: made.append(key) or {"y": 1e-3})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert [mdconv._usable(*KEY, width) for width in (96, 96, 192)] == [True] * 3
        device = torch.device("cuda", 0)
        assert made == [(device, torch.float32, torch.bfloat16, width) for width in (96, 192)]

    @pytest.mark.parametrize("wrong", [0.5, float("nan")])
    def test_wrong_values_warn_once_and_end_it(self, able, wrong, monkeypatch):
        monkeypatch.setattr(mdconv, "relative_errors", lambda *_: {"gaze": 1e-4, "bias": wrong})
        with pytest.warns(RuntimeWarning, match=r"bias is off by .*plain PyTorch") as caught:
            assert [mdconv._usable(*KEY, width) for width in (96, 96, 192)] == [False] * 3
        assert len(caught) == 1

    def test_exceptions_of_the_compiler_warn_once_and_end_it(self, able, monkeypatch):
        def fail(*_):
            raise RuntimeError("PTXAS failed\nand much more")

        monkeypatch.setattr(mdconv, "relative_errors", fail)
        with pytest.warns(RuntimeWarning, match="RuntimeError: PTXAS failed;") as caught:
            assert [mdconv._usable(*KEY, width) for width in (96, 192)] == [False] * 2
        assert len(caught) == 1

    def test_insisting_skips_the_check_and_names_the_obstacle(self, able, monkeypatch):
        monkeypatch.delattr(mdconv, "relative_errors")
        assert mdconv._usable("triton", *KEY[1:], 96)
        monkeypatch.setattr(mdconv, "_obstacle", lambda *_: "Triton is not installed")
        assert not mdconv._usable(*KEY, 96)
        with pytest.raises(EnvironmentFault, match="Triton is not installed"):
            mdconv._usable("triton", *KEY[1:], 96)

    @pytest.mark.parametrize(
        ("capability", "triton", "expected"),
        [((7, 5), True, "below 8.0"), ((8, 0), False, "not installed"), ((9, 0), True, "")],
    )
    def test_obstacles(self, capability, triton, expected, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(mdconv, "find_spec", lambda _: object() if triton else None)
        found = mdconv._obstacle(0, torch.bfloat16)
        assert found.endswith(expected)
        assert bool(found) == bool(expected)
        assert "float64" in mdconv._obstacle(0, torch.float64)


if __name__ == "__main__":
    without_wrappers()
    torch.manual_seed(0)
    sys.stdout.write(json.dumps(globals()[sys.argv[1]]()))
