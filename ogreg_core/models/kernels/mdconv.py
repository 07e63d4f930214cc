"""MDConv as one operator with kernels for CUDA, and the choice between them and the plain path.

The plain path (``frame_dissimilarity``, ``modulation``, ``modulated_conv``) is a chain of some twenty
operators, each of which reads and writes all features. Counted, not measured on a GPU: bytes per
feature that operators read and write, per forward and per backward (16 frames, C = 96):

    ===============================  =========  ======  =========
    features to Gaze                 plain      here    the least
    ===============================  =========  ======  =========
    float32 to bfloat16 (autocast)   93, 399    10, 17  6, 10
    bfloat16                         49, 222    6, 11   4, 6
    float32                          99, 443    12, 21  8, 12
    ===============================  =========  ======  =========

"Plain" is what torch's own differentiation of the definition does; "here" counts once what
neighbouring programs read at about the same time, which caches have to make true. Forward is two
kernels: d, then the convolution with the modulation inline (27 multiply-adds, one sigmoid per
feature). One kernel could save the second reading of y only if a program held all channels of its
positions: at C = 96 a quarter of its lanes would idle (tiles are powers of two), which at these
27 multiply-adds costs about what it saves, and the later stages fit into the L2 cache anyway.
Backward is three: sums for the parameters and d (45 multiply-adds, three sigmoids), the gradient of
d (bytes per position), and the gradient of y (27 multiply-adds, nine sigmoids: m belongs to the
neighbours, and each is computed once per walk along time, never stored).

``OGREG_KERNELS`` chooses: ``auto`` (default) takes the kernels on CUDA devices of compute capability
8.0 and later where Triton can be imported and a check of values and gradients against the plain path
in float64 passes, once per device, dtypes and width; if not, it warns once and keeps to the plain
path. ``plain`` never takes them. ``triton`` takes them unchecked and fails where they cannot run on
CUDA. On CPUs, for float64, in ``torch.export`` and in traces (which count multiply-adds) the plain
path is always taken. ``torch.compile`` sees one opaque operator.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from ogreg_core.errors import EnvironmentFault, UsageError

__all__ = ["can_use", "gaze", "relative_errors"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

_CHOICES = ("auto", "plain", "triton")
_DEVICES = ("cuda",)  # the tests put Triton's interpreter in its place
# Of a norm of differences, relative: what rounding to the dtype leaves.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}

# --- the operator ----------------------------------------------------------------------------------


def gaze(y: Tensor, weight: Tensor, bias: Tensor, sharpness: Tensor, offset: Tensor) -> Tensor:
    """MDConv with the modulation of each position, by the kernels; ask :func:`can_use` first.

    Equals ``modulated_conv(y, weight, modulation(frame_dissimilarity(y), sharpness, offset), bias)``
    with everything between input and output in float32. Differentiable once.

    Args:
        y: features ``[B, T, H, W, C]``; float32, bfloat16 or float16.
        weight: ``[C, 1, 3, 3, 3]``.
        bias, sharpness, offset: ``[C]``.

    Returns:
        ``[B, T, H, W, C]`` in the dtype of autocast where it is on, else of y.
    """
    out: Tensor = torch.ops.ogreg.mdconv(
        y.contiguous(), weight, bias, sharpness, offset, _result_dtype(y)
    )[0]
    return out


def _result_dtype(y: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(y.device.type):
        return torch.get_autocast_dtype(y.device.type)
    return y.dtype


@torch.library.custom_op(
    "ogreg::mdconv",
    mutates_args=(),
    schema="(Tensor y, Tensor weight, Tensor bias, Tensor sharpness, Tensor offset, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
def _mdconv(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    sharpness: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    from ogreg_core.models.kernels.mdconv_forward import forward

    weight, bias = weight.contiguous(), bias.contiguous()
    return forward(y, weight, bias, sharpness.contiguous(), offset.contiguous(), dtype)


@_mdconv.register_fake
def _(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    sharpness: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames, height, width, _ = y.shape
    return (
        y.new_empty(y.shape, dtype=dtype),
        y.new_empty((batch, frames - 1, height, width), dtype=torch.float32),
        y.new_empty((batch, frames, height, width), dtype=torch.float32),
    )


@torch.library.custom_op(
    "ogreg::mdconv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor y, Tensor weight, Tensor bias, Tensor sharpness, Tensor offset,"
    " Tensor dissimilarity, Tensor norm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _mdconv_backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    sharpness: Tensor,
    offset: Tensor,
    dissimilarity: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ogreg_core.models.kernels.mdconv_backward import backward

    grad, weight = grad.contiguous(), weight.contiguous()
    a, b = sharpness.contiguous(), offset.contiguous()
    grad_y, *rest = backward(grad, y, weight, a, b, dissimilarity, norm)
    owners = (weight, bias, sharpness, offset)
    # Slices of one sum must not leave as views of one another.
    new = [part.to(owner.dtype, copy=True) for part, owner in zip(rest, owners, strict=True)]
    return grad_y, new[0], new[1], new[2], new[3]


@_mdconv_backward.register_fake
def _(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    sharpness: Tensor,
    offset: Tensor,
    dissimilarity: Tensor,
    norm: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y_like, weight_like = torch.empty_like(y), weight.new_empty(weight.shape)
    bias_like, sharpness_like = bias.new_empty(bias.shape), sharpness.new_empty(sharpness.shape)
    return y_like, weight_like, bias_like, sharpness_like, offset.new_empty(offset.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, dissimilarity, norm = output
    ctx.save_for_backward(*inputs[:5], dissimilarity, norm)
    ctx.mark_non_differentiable(dissimilarity, norm)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, *_none: None) -> tuple[Tensor | None, ...]:
    return (*torch.ops.ogreg.mdconv_backward(grad, *ctx.saved_tensors), None)


_mdconv.register_autograd(_differentiate, setup_context=_keep)

# --- the choice ------------------------------------------------------------------------------------


def _constant_in_graphs(function: _Function) -> _Function:
    """``torch.compiler.assume_constant_result``, which would import all of the compiler, and Triton,
    for everybody: in a compiled graph the function is called once and its answer stays.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def can_use(y: Tensor) -> bool:
    """Whether :func:`gaze` may be called on these features here and now; see the head of this file.

    Args:
        y: features ``[B, T, H, W, C]``.

    Raises:
        UsageError: ``OGREG_KERNELS`` is set to something unknown.
        EnvironmentFault: it is ``triton``, and they cannot run on this CUDA device.
    """
    choice = _choice()
    # Traces count or convert what they see; an exported program must run without this package.
    if torch.jit.is_tracing() or _is_exporting():
        return False
    height, width, channels = y.shape[2:]
    # Within a frame the kernels count in 32 bits.
    fits = y.dtype in _TOLERANCE and y.numel() > 0 and height * width * channels < 2**31
    if choice == "plain" or y.device.type not in _DEVICES or not fits:
        return False
    return _usable(choice, y.device.index, y.dtype, _result_dtype(y), channels)


@_constant_in_graphs
def _choice() -> str:
    value = os.environ.get("OGREG_KERNELS", "auto")
    if value not in _CHOICES:
        raise UsageError(
            f"OGREG_KERNELS={value} is none of {', '.join(_CHOICES)}",
            where="environment",
            fix="unset OGREG_KERNELS",
        )
    return value


@_constant_in_graphs
def _is_exporting() -> bool:
    """Asked here: older versions of Dynamo answer True for everybody where they see the call."""
    return torch.compiler.is_exporting()


_verdicts: dict[tuple[int, torch.dtype, torch.dtype, int], bool] = {}
_failed: set[int] = set()


@_constant_in_graphs
def _usable(
    choice: str, index: int, dtype: torch.dtype, result: torch.dtype, channels: int
) -> bool:
    """The verdict on a device, dtypes and width: kernels are compiled anew for each of them."""
    obstacle = _obstacle(index, result)
    if choice == "triton":
        if obstacle:
            raise EnvironmentFault(
                f"cuda:{index} cannot run the kernels that OGREG_KERNELS=triton asks for",
                why=obstacle,
                fix="unset OGREG_KERNELS",
            )
        return True
    if obstacle or index in _failed:
        return False
    key = (index, dtype, result, channels)
    if key not in _verdicts:
        _verdicts[key] = _passes(torch.device("cuda", index), dtype, result, channels)
        if not _verdicts[key]:
            _failed.add(index)
    return _verdicts[key]


def _obstacle(index: int, result: torch.dtype) -> str:
    """Why the kernels cannot be tried on a CUDA device; empty if they can."""
    if result not in _TOLERANCE:
        return f"no kernel writes {result}"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no CUDA device"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "its compute capability is below 8.0"
    return "" if find_spec("triton") else "Triton is not installed"


def _passes(device: torch.device, dtype: torch.dtype, result: torch.dtype, channels: int) -> bool:
    """Whether a small example agrees with the plain path; warns if it does not."""
    try:
        # In a thread of its own, where no context of the caller is active: inside activation
        # checkpointing, what the example saves for its gradients would count as the block's.
        with ThreadPoolExecutor(1) as apart:
            errors = apart.submit(relative_errors, device, dtype, result, channels).result()
    except Exception as error:  # A safety net: whatever a compiler or driver raises ends here.
        lines = str(error).splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0]}"
    else:
        # What is rounded to a dtype; gradients of parameters are summed in float32 from the same values.
        limits = {"gaze": _TOLERANCE[result], "gradient of y": _TOLERANCE[dtype]}
        # Not "error > limit": not-a-number must not pass.
        wrong = {
            name: error for name, error in errors.items() if not error <= limits.get(name, 1e-3)
        }
        if not wrong:
            return True
        why = ", ".join(f"{name} is off by {error:.1e}" for name, error in wrong.items())
    warnings.warn(
        f"MDConv's kernels failed their check on {device} ({dtype}, C = {channels}): {why};"
        " plain PyTorch is used instead, which is slower and right",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def relative_errors(
    device: torch.device, dtype: torch.dtype, result: torch.dtype, channels: int
) -> dict[str, float]:
    """The kernels beside the plain path in float64 on a small random example.

    Args:
        device: where both run.
        dtype, result: of the features and of the Gaze.
        channels: C.

    Returns:
        Norm of the difference over the norm of the reference, for the Gaze and for the gradient of
        each input.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + mean).to(device)

    # Whatever the caller's context is, it is left alone.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        y = normal(2, 3, 5, 6, channels).to(dtype)
        grad = normal(*y.shape).to(result)
        inputs = {
            "y": y,
            "weight": normal(channels, 1, 3, 3, 3, scale=0.3),
            "bias": normal(channels),
            "sharpness": normal(channels, mean=4.0),
            "offset": normal(channels, mean=-2.0),
        }
        leaves = [tensor.requires_grad_() for tensor in inputs.values()]
        exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
        out = torch.ops.ogreg.mdconv(*leaves, result)[0]
        reference = _plain(*exact)
        ours = (out, *torch.autograd.grad(out, leaves, grad))
        theirs = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    names = ("gaze", *(f"gradient of {name}" for name in inputs))
    pairs = zip(names, ours, theirs, strict=True)
    return {name: float(((a.double() - b).norm() / b.norm()).detach()) for name, a, b in pairs}


def _plain(y: Tensor, weight: Tensor, bias: Tensor, sharpness: Tensor, offset: Tensor) -> Tensor:
    # Imported here: that module asks this one which path to take.
    from ogreg_core.models.mdconv import frame_dissimilarity, modulated_conv, modulation

    return modulated_conv(y, weight, modulation(frame_dissimilarity(y), sharpness, offset), bias)
