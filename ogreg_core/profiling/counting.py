"""Multiply-adds by fvcore, and an independent count of the same products by torch.

One multiply-add counts once, as in the field's tables ("GFLOPs" there). fvcore counts operators in
a trace; its count of fused attention is zero, so a handler is added here. Beside matrix products and
convolutions fvcore counts norms and bilinear interpolation, which torch's counter leaves out.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "FlopReport",
    "Observation",
    "count_multiply_adds",
    "count_parameters",
    "observe",
    "paths_to",
]

# Operators that move, compare or combine elements without multiplying them in a matrix product or
# convolution. fvcore's convention leaves them out; listing them keeps the list of uncounted
# operators meaningful.
_ELEMENTWISE_NAMES = """
    abs adaptive_avg_pool3d add_ add addcmul_ addcmul amax amin avg_pool2d avg_pool3d clamp_min cos
    cosine_similarity div div_ dropout_ exp expand_as fill_ gelu index_select linalg_vector_norm
    max_pool2d max_pool3d mean mul_ mul ne neg new_ones pad pow randperm repeat repeat_interleave
    rsub sigmoid sin softmax sort sqrt square sub_ sub sum tanh tensor_split unfold
    upsample_bicubic2d view_as
"""
_ELEMENTWISE = frozenset(f"aten::{name}" for name in _ELEMENTWISE_NAMES.split())
# What fvcore calls matrix products and convolutions, and ours.
_PRODUCTS = ("addmm", "attention", "bmm", "conv", "einsum", "linear", "matmul", "mm")


@dataclass(frozen=True)
class FlopReport:
    """Multiply-adds of one forward pass.

    Args:
        total: of everything counted.
        by_operator: per operator kind.
        by_module: per module by its path, with all that runs inside it; modules without any are left
            out.
        attention_share: share of ``total`` inside fused attention, 0..1.
        uncounted: operators without a counter that are not plain element-wise work, with their
            number of calls.
    """

    total: int
    by_operator: dict[str, int]
    by_module: dict[str, int]
    attention_share: float
    uncounted: dict[str, int]

    @property
    def attention(self) -> int:
        """In fused attention."""
        return self.by_operator.get("attention", 0)

    @property
    def products(self) -> int:
        """In matrix products and convolutions: all but norms and interpolation."""
        return sum(self.by_operator.get(kind, 0) for kind in _PRODUCTS)


def count_parameters(model: nn.Module) -> int:
    """All parameters, trainable or not."""
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _attention_multiply_adds(inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
    """Query times keys and weights times values of ``F.scaled_dot_product_attention``."""
    query, key, value = (inputs[i].type().sizes() for i in range(3))
    scores = math.prod(query) * key[-2]
    mixed = math.prod(query[:-1]) * key[-2] * value[-1]
    return Counter({"attention": scores + mixed})


def count_multiply_adds(model: nn.Module, clip: Tensor) -> FlopReport:
    """Count with fvcore, fused attention included.

    Args:
        model: left in the mode it was in.
        clip: one input batch, ``[B, 3, T, H, W]``.
    """
    # What is done for a backward pass alone is no part of the cost, and would hold its memory.
    with warnings.catch_warnings(), _evaluating(model), torch.no_grad():
        # fvcore traces with torch.jit, which newer versions of torch announce as deprecated at
        # import and use.
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, clip)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_multiply_adds)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings(
            "none"
        )
        total = int(analysis.total())
        operators = {name: int(count) for name, count in analysis.by_operator().items()}
        modules = {
            name: int(count) for name, count in analysis.by_module().items() if name and count
        }
        unsupported = dict(analysis.unsupported_ops())
    return FlopReport(
        total=total,
        by_operator=operators,
        by_module=modules,
        attention_share=operators.get("attention", 0) / total if total else 0.0,
        uncounted={name: calls for name, calls in unsupported.items() if name not in _ELEMENTWISE},
    )


def paths_to(name: str) -> list[str]:
    """A module's path and those of all that it is inside of, the whole, "", first."""
    return ["", *accumulate(name.split("."), "{}.{}".format)] if name else [""]


# --- torch's own count -------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """What one forward pass shows from below, operator by operator.

    Args:
        multiply_adds: in matrix products and convolutions, by torch's counter.
        attention: those of them in fused attention, counted as the products that it replaces.
        activations: elements that matrix products, convolutions and fused attention put out, per module
            by its path, with all that runs inside it; the whole under "".
        order: modules that are called, by their path: the place of their first call.
    """

    multiply_adds: int
    attention: int
    activations: dict[str, int]
    order: dict[str, int]


class _AttentionCount(TorchFunctionMode):
    """Counts what runs inside fused attention, and the elements that come out of it."""

    def __init__(self, outputs: _OutputCount) -> None:
        super().__init__()
        self.flops = 0
        self._outputs = outputs

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        # The fused kernel keeps no scores: what it would store stays out of the activations.
        with self._outputs.closed(), FlopCounterMode(display=False) as counter:
            result = func(*args, **(kwargs or {}))
        self.flops += counter.get_total_flops()
        self._outputs.add(result.numel())
        return result


_aten = torch.ops.aten


class _OutputCount(TorchDispatchMode):
    """Sums the output elements of matrix products and convolutions by module."""

    products = (_aten.convolution, _aten.addmm, _aten.mm, _aten.bmm, _aten.baddbmm)

    def __init__(self) -> None:
        super().__init__()
        self.running = [""]
        self.elements: Counter[str] = Counter()
        self.order: dict[str, int] = {}
        self._open = True

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Count nothing meanwhile."""
        self._open = False
        try:
            yield
        finally:
            self._open = True

    def add(self, elements: int) -> None:
        """Credit the module that is running, and those that it is inside of, as fvcore does."""
        for name in paths_to(self.running[-1]):
            self.elements[name] += elements

    def enter(self, name: str) -> None:
        """A module begins."""
        self.order.setdefault(name, len(self.order))
        self.running.append(name)

    def leave(self) -> None:
        """The module that began last ends."""
        self.running.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._open and func.overloadpacket in self.products:
            self.add(result.numel())
        return result


def observe(model: nn.Module, clip: Tensor) -> Observation:
    """Run a model once and count below its operators, with attention taken apart into its products.

    Args:
        model: left in the mode it was in; on the meta device nothing is computed, which takes a
            fraction of a second.
        clip: one input batch on its device, ``[B, 3, T, H, W]``.
    """
    outputs = _OutputCount()
    attention = _AttentionCount(outputs)
    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks += [
                module.register_forward_pre_hook(lambda _m, _i, name=name: outputs.enter(name)),
                module.register_forward_hook(lambda _m, _i, _o: outputs.leave()),
            ]
    try:
        with ExitStack() as stack:
            # Under inference_mode the counter would see operators before they are taken apart.
            for context in (_evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH)):
                stack.enter_context(context)
            counter = stack.enter_context(FlopCounterMode(display=False))
            stack.enter_context(outputs)
            stack.enter_context(attention)
            model(clip)
    finally:
        for hook in hooks:
            hook.remove()
    return Observation(
        multiply_adds=counter.get_total_flops() // 2,
        attention=attention.flops // 2,
        activations=dict(outputs.elements),
        order=outputs.order,
    )
