"""Forms of the Gaze that were measured against MDConv, for the ablation study. All of them are ours.

The question is in which form it pays to let the dissimilarity of frames decide how a depthwise
convolution uses the neighbouring frames. Motion excitation by squeezed differences of features is
known from TEA (arXiv 2004.01398) and ACTION-Net (arXiv 2103.07372), differences of neighbours as
input of a convolution from TDN (arXiv 2012.10071); the formulas here are not theirs. The answers so far
stand in the README, "Forms of the Gaze".

Notation: B batch, T frames, H W rows and columns, C channels; layout channels last,
``[B, T, H, W, C]``. K-, K0, K+ are the temporal slices of a depthwise 3x3x3 kernel, ``*`` the
convolution of one frame, m[t] the modulation between frames t and t+1, and
n[t] = (m[t-1] + m[t]) / 2 what it is at frame t (at the first and last frame the one that there is).
A single frame has no m, and every form is a 2-D convolution of it: of its kernel's middle slice where
taps open, of the three slices' sum where nothing is ever closed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.mdconv import (
    INITIAL_OFFSET,
    INITIAL_SHARPNESS,
    MDConv,
    depthwise_tap,
    depthwise_volume,
    frame_dissimilarity,
    modulated_conv,
    opening,
)

__all__ = ["FORMS", "SIMILARITIES", "GazeForm", "Heard", "Listening", "NoGaze"]


# --- what the modulation listens to -------------------------------------------------------------

# Per channel, of features whose variance is 1: below it two centred features count as alike.
SMALLEST_VARIANCE = 1e-2
# Of d over a clip: below it nothing moves, and relative to it nothing should.
SMALLEST_MEAN = 1e-3


def _position(y: Tensor) -> Tensor:
    return frame_dissimilarity(y).unsqueeze(-1)


def _frame(y: Tensor) -> Tensor:
    return _position(y).mean(dim=(2, 3), keepdim=True)


def _pooled(y: Tensor) -> Tensor:
    return _position(y.mean(dim=(2, 3), keepdim=True))


def _centred(y: Tensor) -> Tensor:
    y = y - y.mean(dim=(1, 2, 3), keepdim=True)
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    product = (y[:, :-1] * y[:, 1:]).sum(dim=-1, keepdim=True)
    # Centred features may vanish, and two that do are alike, so that a still clip has d = 0.
    small = SMALLEST_VARIANCE * y.shape[-1]
    return 1.0 - (product + small) / (norm[:, :-1] * norm[:, 1:] + small)


def _relative(y: Tensor) -> Tensor:
    d = _position(y)
    return 0.1 * d / (d.mean(dim=(1, 2, 3), keepdim=True) + SMALLEST_MEAN)


def _excess(y: Tensor) -> Tensor:
    d = _position(y)
    mean = d.mean(dim=(1, 2, 3), keepdim=True)
    return 0.1 * F.relu(d - mean) / (mean + SMALLEST_MEAN)


def _channel(y: Tensor) -> Tensor:
    return (y[:, 1:] - y[:, :-1]).square() / 2


# Features ``[B, T, H, W, C]`` to the dissimilarity d of neighbouring frames, broadcastable to
# ``[B, T-1, H, W, C]``; 0 where they agree.
SIMILARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "position": _position,
    "frame": _frame,
    "pooled": _pooled,
    "centred": _centred,
    "relative": _relative,
    "excess": _excess,
    "channel": _channel,
}


@dataclass(frozen=True)
class Listening:
    """What the modulation is made of.

    Args:
        similarity: d is one minus the cosine of each ``position`` with itself one frame later; the
            mean of that over the ``frame``; the cosine of the features ``pooled`` over the frame; of
            each position's features ``centred``, less their mean over the clip; of each position
            ``relative`` to the clip, a tenth of its share of the mean; its ``excess`` over the mean
            alone, likewise, so that even noise opens nothing; or of each ``channel`` half the squared
            difference, whose mean over channels is the first one if the features are normalised.
        modulation: m differs between each ``position``, or is its mean over the ``frame``.
        listens: to the block's ``features``, or to the ``stem``'s, averaged onto the block's grid,
            which no attention has mixed.
        sharpness, offset: initial a and b of m = (sigmoid(a d + b) - sigmoid(b)) / (1 - sigmoid(b)).
        channels: each has its ``own`` a and b; its own ``log`` a and b, so that a moves by shares of
            itself (an optimiser's steps of 0.001 hardly move a = 30); all have one ``shared``, or one
            that is ``fixed``.
    """

    similarity: str = "position"
    modulation: str = "position"
    listens: str = "features"
    sharpness: float = INITIAL_SHARPNESS
    offset: float = INITIAL_OFFSET
    channels: str = "own"


class Heard:
    """What the stem of a network told its blocks in the pass that is under way, or was the last.

    ``dissimilarity`` is d of the stem's features, ``[B, T-1, H, W, 1]`` on their grid, or 1 x 1.
    """

    dissimilarity: Tensor | None = None

    def __getstate__(self) -> dict[str, Tensor]:
        # Copies of a network (moving averages) begin without it: it may be part of a graph.
        return {}

    def on_grid(self, y: Tensor) -> Tensor:
        """d for features ``[B, T, H, W, C]``: ``[B, T-1, H, W, 1]`` on their grid, or 1 x 1.

        Raises:
            UsageError: the features are not of the clip that the stem has seen.
        """
        d = self.dissimilarity
        if d is None or d.shape[1] != y.shape[1] - 1 or len(d) < len(y):
            raise UsageError(
                "model option listens='stem' needs all frames and positions of a clip",
                why="token selection takes some of them away",
                fix="take model.token_selection out of the recipe",
            )
        d = d[: len(y)]
        if d.shape[2:4] == (1, 1):
            return d
        maps = F.adaptive_avg_pool2d(d.squeeze(-1).flatten(0, 1), (y.shape[2], y.shape[3]))
        return rearrange(maps, "(b t) h w -> b t h w 1", b=len(d))


# --- forms --------------------------------------------------------------------------------------


def at_frames(m: Tensor) -> Tensor:
    """n of m: ``[B, T-1, ...] -> [B, T, ...]``."""
    return torch.cat([m[:, :1], (m[:, 1:] + m[:, :-1]) / 2, m[:, -1:]], dim=1)


class GazeForm(MDConv):
    """Modulated: ``K0 * y[t] + m[t-1] . (K- * y[t-1]) + m[t] . (K+ * y[t+1])``, as MDConv, with every
    choice of what m is made of. The base of the other forms.

    Args:
        dim: channels C.
        listening: what m is made of.
        heard: what the stem says; needed if ``listening`` is to it.
    """

    form = "modulated"

    def __init__(self, dim: int, listening: Listening, heard: Heard | None = None) -> None:
        super().__init__(dim, sharpness=listening.sharpness, offset=listening.offset)
        self.gaze = self.form
        self.listening = listening
        self.heard = heard
        if listening.channels == "log":
            self.log_sharpness = nn.Parameter(self.sharpness.detach().log())
            del self.sharpness
        elif listening.channels != "own":
            for name in ("sharpness", "offset"):
                one = getattr(self, name).detach()[:1].clone()
                delattr(self, name)
                if listening.channels == "shared":
                    self.register_parameter(name, nn.Parameter(one))
                else:
                    self.register_buffer(name, one)

    def dissimilarity(self, y: Tensor) -> Tensor:
        """d at each position, mean over channels: ``[B, T, H, W, C] -> [B, T-1, H, W]``."""
        if self.listening.similarity in ("frame", "pooled") and self.heard is None:
            return frame_dissimilarity(y)
        d = self.listen(y).mean(dim=-1)
        return d.expand(-1, -1, *y.shape[2:4])

    def listen(self, y: Tensor) -> Tensor:
        """d, broadcastable to ``[B, T-1, H, W, C]``."""
        if self.heard is not None:
            return self.heard.on_grid(y)
        return SIMILARITIES[self.listening.similarity](y)

    def modulation(self, y: Tensor) -> Tensor | None:
        """m for features ``[B, T, H, W, C]``, broadcastable to ``[B, T-1, H, W, C]``; None for one
        frame.
        """
        if y.shape[1] == 1:
            return None
        m = self.open(self.listen(y))
        return m.mean(dim=(2, 3), keepdim=True) if self.listening.modulation == "frame" else m

    def open(self, d: Tensor) -> Tensor:
        """m of d."""
        return opening(d, self.slope(), self.offset)

    def slope(self) -> Tensor:
        """a, ``[C]`` or ``[1]``."""
        return self.log_sharpness.exp() if self.listening.channels == "log" else self.sharpness

    def convolve(self, y: Tensor, m: Tensor | None) -> Tensor:
        """The form's formula: ``[B, T, H, W, C]`` to the same."""
        return modulated_conv(y, self.weight, m, self.bias)

    def forward(self, y: Tensor) -> Tensor:
        return self.convolve(y, self.modulation(y))


class Mixed(GazeForm):
    """Two kernels: ``(1 - n[t]) . (k * y[t]) + n[t] . (K- * y[t-1] + K0 * y[t] + K+ * y[t+1])`` with a
    2-D kernel k of its own; a single frame sees k alone.
    """

    form = "mixed"

    def __init__(self, dim: int, listening: Listening, heard: Heard | None = None) -> None:
        super().__init__(dim, listening, heard)
        self.flat = nn.Parameter(torch.empty(dim, 1, 3, 3))

    def init_weights(self) -> None:
        """Draw both kernels alike."""
        super().init_weights()
        nn.init.normal_(self.flat, std=(2.0 / 27.0) ** 0.5)

    def convolve(self, y: Tensor, m: Tensor | None) -> Tensor:
        """See the class."""
        flat = depthwise_tap(y, self.flat, self.bias)
        if m is None:
            return flat
        deep = modulated_conv(y, self.weight, y.new_ones(1), self.bias)
        return torch.addcmul(flat, at_frames(m), deep - flat)


class Difference(GazeForm):
    """The temporal taps see what changes: ``K0 * y[t] + m[t-1] . (K- * (y[t-1] - y[t])) + m[t] . (K+ *
    (y[t+1] - y[t]))``. Where frames agree nothing is added, however far m opens, and what opens does
    not change how a still picture is seen; small changes are left out, as noise is by shrinkage. The
    first and last frame have one neighbour.
    """

    form = "difference"

    def convolve(self, y: Tensor, m: Tensor | None) -> Tensor:
        """See the class."""
        out = depthwise_tap(y, self.weight[:, :, 1], self.bias)
        if m is None:
            return out
        change = y[:, 1:] - y[:, :-1]
        out[:, 1:].addcmul_(m, depthwise_tap(change, self.weight[:, :, 0]), value=-1.0)
        out[:, :-1].addcmul_(m, depthwise_tap(change, self.weight[:, :, 2]))
        return out


class Open(GazeForm):
    """m = 1 whatever the frames are: not modulated, without a and b."""

    def __init__(self, dim: int, listening: Listening, heard: Heard | None = None) -> None:
        super().__init__(dim, listening, heard)
        del self.sharpness, self.offset

    def modulation(self, y: Tensor) -> Tensor | None:
        """1; None for one frame."""
        return None if y.shape[1] == 1 else y.new_ones(1)


class Difference3d(Open, Difference):
    """:class:`Difference` with m = 1: a 3-D convolution written otherwise, but for the first and last
    frame.
    """

    form = "difference-3d"


class Repeating3d(Open):
    """The 3-D convolution that :class:`Gated` emphasises, by itself: m = 1 with the first and last frame
    as their own neighbours.
    """

    form = "3d-repeating"

    def convolve(self, y: Tensor, m: Tensor | None) -> Tensor:
        """See the class."""
        return depthwise_volume(y, self.weight, self.bias)


def emphasise(seen: Tensor, m: Tensor | None) -> Tensor:
    """``(1 + n[t]) . seen[t]``, ``[B, T, H, W, C]``; without neighbours, which is m = None, as it is."""
    return seen if m is None else torch.addcmul(seen, seen, at_frames(m))


class Gated(GazeForm):
    """Motion emphasises and nothing is closed: ``(1 + n[t]) . (K- * y[t-1] + K0 * y[t] + K+ *
    y[t+1])``, the 3-D convolution and its bias. The first and last frame are their own neighbours,
    as nothing else would keep a still clip still.
    """

    form = "gated"

    def convolve(self, y: Tensor, m: Tensor | None) -> Tensor:
        """See the class."""
        return emphasise(depthwise_volume(y, self.weight, self.bias), m)


class Gated2d(GazeForm):
    """``(1 + n[t]) . (K0 * y[t])``: motion emphasises, and is seen by no other way (K- and K+ are
    idle).
    """

    form = "gated-2d"

    def convolve(self, y: Tensor, m: Tensor | None) -> Tensor:
        """See the class."""
        return emphasise(modulated_conv(y, self.weight, None, self.bias), m)


class Emphasised(GazeForm):
    """Motion opens the temporal taps and emphasises: ``(1 + n[t]) . (K0 * y[t] + m[t-1] . (K- *
    y[t-1]) + m[t] . (K+ * y[t+1]))``, from a 2-D convolution to twice the 3-D one.
    """

    form = "emphasised"

    def convolve(self, y: Tensor, m: Tensor | None) -> Tensor:
        """See the class."""
        return emphasise(super().convolve(y, m), m)


class Excitation(Gated):
    """:class:`Gated` by a learned m instead of one of the cosine: ``m[t] = tanh(W2 |W1 y[t+1] - W1
    y[t]|)`` with W1 from C to C/4 channels and W2 back, no biases; 0 where frames agree, in (-1, 1).
    """

    form = "excitation"

    def __init__(self, dim: int, listening: Listening, heard: Heard | None = None) -> None:
        super().__init__(dim, listening, heard)
        del self.sharpness, self.offset
        self.squeeze = nn.Linear(dim, dim // 4, bias=False)
        self.excite = nn.Linear(dim // 4, dim, bias=False)

    def init_weights(self) -> None:
        """Draw the kernel, and both maps so that they keep the variance."""
        super().init_weights()
        for layer in (self.squeeze, self.excite):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def modulation(self, y: Tensor) -> Tensor | None:
        """See the class."""
        if y.shape[1] == 1:
            return None
        squeezed = self.squeeze(y)
        change = (squeezed[:, 1:] - squeezed[:, :-1]).abs()
        if self.listening.modulation == "frame":
            change = change.mean(dim=(2, 3), keepdim=True)
        return self.excite(change).tanh()


class Sigmoid(GazeForm):
    """:class:`GazeForm` with m = sigmoid(a d + b): a still clip keeps sigmoid(b) of the temporal taps."""

    form = "sigmoid"

    def open(self, d: Tensor) -> Tensor:
        """m of d."""
        return torch.addcmul(self.offset, d, self.slope()).sigmoid()


class Inverse(GazeForm):
    """Control: :class:`GazeForm` with 1 - m, whose temporal taps open where frames agree."""

    form = "inverse"

    def open(self, d: Tensor) -> Tensor:
        """m of d."""
        return 1.0 - super().open(d)


class Random(GazeForm):
    """Control: :class:`GazeForm` with d of another place: the clip's own values, in the order of a
    permutation of all frames and positions that is the same for every clip of a size.
    """

    form = "random"

    def listen(self, y: Tensor) -> Tensor:
        """d, shuffled."""
        d = super().listen(y)
        places = rearrange(d, "b t h w c -> b (t h w) c")
        # Named, because a model may run on the meta device, whose tensors have no values.
        fixed = torch.Generator(device="cpu").manual_seed(0)
        order = torch.randperm(places.shape[1], generator=fixed, device="cpu").to(d.device)
        return places.index_select(1, order).view_as(d)

    def dissimilarity(self, y: Tensor) -> Tensor:
        """d at each position, where it is."""
        return frame_dissimilarity(y) if self.heard is None else self.heard.on_grid(y).squeeze(-1)


class GatedInverse(Inverse, Gated):
    """Control: :class:`Gated` with 1 - m, which emphasises what stands still."""

    form = "gated-inverse"


class GatedRandom(Random, Gated):
    """Control: :class:`Gated` with d of another place, see :class:`Random`."""

    form = "gated-random"


class NoGaze(MDConv):
    """No Gaze: nothing is seen, without parameters."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.gaze = "none"

    def init_weights(self) -> None:
        """There is nothing to draw."""

    def modulation(self, y: Tensor) -> Tensor | None:
        """There is none."""
        return None

    def forward(self, y: Tensor) -> Tensor:
        return y.new_zeros(1)


FORMS: dict[str, type[GazeForm]] = {
    kind.form: kind
    for kind in (
        *(GazeForm, Mixed, Difference, Difference3d, Repeating3d, Gated, Gated2d, Emphasised),
        *(Excitation, Sigmoid, Inverse, Random, GatedInverse, GatedRandom),
    )
}
