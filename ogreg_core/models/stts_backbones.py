"""Where token selection (:mod:`ogreg_core.models.stts`) stands in each backbone.

Published (arXiv 2111.11591, github.com/wangjk666/STTS, commit 6ae3404): MViT-v1-B with frames selected
before block 0 and windows before block 4 (T^0, S^4), and Video-Swin-B with frames selected before
stage 0 (T^0). Billions of multiply-adds of one view, counted by :mod:`ogreg_core.profiling` with 400
classes; the names in the paper are rounded ratios:

====================  ==========================  ===========================  =====
mvit_v1_b, 16 frames  time before block 0         space before block 4         GMACs
====================  ==========================  ===========================  =====
dense                                                                          70.8
T0.9-S0.9             0.875, 7 of 8 token frames  0.863, 13x13 of 14x14        56.4
T0.8-S0.9             0.75, 6                     0.863                        47.2
T0.6-S0.9             0.625, 5                    0.863                        38.5
T0.5-S0.7             0.5, 4                      0.7367, 12x12                27.0
T0.4-S0.6             0.375, 3                    0.6174, 11x11                18.5
====================  ==========================  ===========================  =====

Video-Swin pads the frames that are left to whole windows of 8, so that it gains little until 8 or
fewer are left: swin3d_b at 32 frames costs 281.9 with all 16 token frames and 261.5 with 14.

OG-ReG is ours, no result of it is published. We recommend frames before stage 1 and windows before
stage 2: ``Selection(time=(Keep(1, 0.5),), space=(Keep(2, 0.7367),))``. Measured with ogreg-t, 32
frames of 224 pixels, half of the 16 token frames and 0.7367 of the positions (windows of 12x12 where
frames have 14x14), alone and together:

====================  =====  =================  =================  =================
GMACs                 alone  and space from 1   and space from 2   and space from 3
====================  =====  =================  =================  =================
no frames dropped     67.2   52.5               55.3               64.1
frames from stage 0   33.7   26.9               28.3               32.3
frames from stage 1   38.7   32.0               33.3               37.4
frames from stage 2   43.9   36.1               38.5               42.6
frames from stage 3   60.2   47.7               50.5               58.9
====================  =====  =================  =================  =================

Time comes first. A dropped frame saves its whole share of everything behind the selection, as no path of
OG-ReG pools time; and Gaze compares neighbouring frames position by position, which windows that lie
elsewhere in each frame disturb (12x12 of 14x14 are at most 2 positions apart). Before stage 1 rather than
0: that gives up 5.0 of the 33.5 saved, and lets the blocks of stage 0 compare frames that are true
neighbours; behind the selection they may lie further apart. Before stage 2 it would give up 10.2. Windows
before stage 2, which does about half of the work on 14x14 positions, as MViT does behind S^4; before
stage 3, with 7x7 positions, they save little. How much accuracy this costs has not been measured.

Notation: B clips, T token frames, H W rows and columns of tokens, C channels. Features are channels
last, ``[B, T, H, W, C]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from ogreg_core.errors import UsageError
from ogreg_core.models.ogreg import OGReG
from ogreg_core.models.protocol import BlockMaps
from ogreg_core.models.stts import (
    AnchorSelector,
    FrameSelector,
    Grid,
    Keep,
    KeptTokens,
    Perturbation,
    Selection,
)

__all__ = [
    "SelectingMViT",
    "SelectingOGReG",
    "SelectingSwin",
    "TokenSelecting",
    "select_tokens",
    "with_token_selection",
]


# --- the wrapper -------------------------------------------------------------------------------


class TokenSelecting(nn.Module, ABC):
    """A backbone with selections in it; what is common to all backbones.

    It takes over the backbone's modules under their names, so that the backbone's weights fit; the
    scorers have the names of the released code.

    Args:
        model: the backbone; its modules are shared, not copied.
        selection: what to keep.
        widths: channels in front of each place (block or stage).
        unit: what a place is called.

    Raises:
        UsageError: the selection names a place that the backbone does not have.
    """

    num_classes: int
    sigma: Tensor
    time_score_predictor: nn.ModuleList
    space_score_predictor: nn.ModuleList

    def __init__(
        self, model: nn.Module, selection: Selection, widths: Sequence[int], unit: str
    ) -> None:
        super().__init__()
        for keep in (*selection.time, *selection.space):
            if not 0 <= keep.before < len(widths):
                raise UsageError(
                    f"token_selection stands before {unit} {keep.before}",
                    why=f"the model has {unit}s 0 to {len(widths) - 1}",
                )
        for name, child in model.named_children():
            self.add_module(name, child)
        self.selection = selection
        self.places = len(widths)
        self.time_score_predictor = nn.ModuleList(
            FrameSelector(widths[keep.before], keep.ratio) for keep in selection.time
        )
        self.space_score_predictor = nn.ModuleList(
            AnchorSelector(widths[keep.before], keep.ratio) for keep in selection.space
        )
        # A tensor, because a compiled model would be compiled anew for every value of a number. Not
        # part of the weights: the loop sets it before each step.
        self.register_buffer("sigma", torch.tensor(selection.sigma), persistent=False)
        self.to(next(model.parameters()).device)
        self.train(model.training)

    # What a backbone says of itself.

    @abstractmethod
    def first_grid(self, clip: Tensor) -> Grid:
        """The tokens of clips ``[B, 3, T, H, W]`` in front of place 0."""

    @abstractmethod
    def halves(self, place: int) -> bool:
        """Whether height and width are halved between the selections of the place before and of this
        one.
        """

    @abstractmethod
    def embed(self, clip: Tensor) -> tuple[Tensor | None, Tensor]:
        """Class token ``[B, 1, C]``, if there is one, and tokens ``[B, T, H, W, C]``."""

    def enter(self, place: int, x: Tensor) -> Tensor:
        """What the backbone does in front of the selections of a place."""
        return x

    @abstractmethod
    def run_place(
        self, place: int, token: Tensor | None, x: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """A block or stage: class token and tokens."""

    @abstractmethod
    def classify(self, token: Tensor | None, x: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""

    def ends_stage(self, place: int) -> bool:
        """Whether the features after this place are those of a stage."""
        return True

    # What all have in common.

    def set_progress(self, share: float) -> None:
        """Fade the noise: sigma falls linearly from its start to 0.

        Args:
            share: steps done over all steps of the training, 0..1; to be set before each step.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"progress {share} is no share")
        self.sigma.fill_(self.selection.sigma * (1.0 - share))

    def selectors(self, place: int) -> dict[str, FrameSelector | AnchorSelector]:
        """The selections in front of a place in their order, by name: ``time0``, ``space4``."""
        found: dict[str, FrameSelector | AnchorSelector] = {}
        for kind, keeps, modules in (
            ("time", self.selection.time, self.time_score_predictor),
            ("space", self.selection.space, self.space_score_predictor),
        ):
            for keep, module in zip(keeps, modules, strict=True):
                if keep.before == place:
                    found[f"{kind}{place}"] = cast(FrameSelector, module)
        return found

    def scorers(self, place: int) -> list[str]:
        """Prefixes of the parameters of the scorers in front of a place."""
        return [
            f"{kind}_score_predictor.{index}"
            for kind, keeps in (("time", self.selection.time), ("space", self.selection.space))
            for index, keep in enumerate(keeps)
            if keep.before == place
        ]

    def _draw(self, clip: Tensor) -> dict[str, Perturbation]:
        """Noise for every selection, clip by clip."""
        grid, shapes = self.first_grid(clip), {}
        for place in range(self.places):
            grid = grid.halved() if self.halves(place) else grid
            for name, selector in self.selectors(place).items():
                shapes[name] = selector.noise_shape(grid, self.selection.samples)
                grid = selector.left(grid)
        drawn = [
            {name: torch.randn(shape, device=clip.device) for name, shape in shapes.items()}
            for _ in range(len(clip))
        ]
        gradient = self.selection.gradient
        return {
            name: Perturbation(torch.stack([noise[name] for noise in drawn]), self.sigma, gradient)
            for name in shapes
        }

    def _run(self, clip: Tensor, trace: KeptTokens | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits and the features after each stage."""
        soft = self._draw(clip) if self.training else {}
        picture = self.first_grid(clip)
        token, x = self.embed(clip)
        features = []
        for place in range(self.places):
            x = self.enter(place, x)
            picture = picture.halved() if self.halves(place) else picture
            for name, selector in self.selectors(place).items():
                before = Grid(*x.shape[1:4])
                x, scores = selector(x, soft.get(name))
                if trace is not None:
                    trace.keep(name, selector, scores, (before, picture))
            token, x = self.run_place(place, token, x)
            if self.ends_stage(place):
                features.append(x)
        return self.classify(token, x), features

    def forward(self, clip: Tensor) -> Tensor:
        return self._run(clip)[0]

    def forward_stages(self, clip: Tensor) -> list[Tensor]:
        """Features after each stage, ``[B, T, H, W, C]`` of the tokens that are left."""
        return self._run(clip)[1]

    @torch.no_grad()
    def forward_with_maps(self, clip: Tensor) -> tuple[Tensor, dict[str, BlockMaps]]:
        """Logits and, per selection, the tokens that are left after it.

        Its gaze is 1 where a token is left and 0 elsewhere, over all token frames of the clip and
        the whole picture at the resolution of the selection; the profile of a selection of frames is
        their score, 0 for frames that were dropped before it. In training mode the map shows the hard
        choice. Maps of the backbone itself are left out: their time is that of the frames that are
        left.
        """
        trace = KeptTokens.all_of(clip, self.first_grid(clip))
        logits, _ = self._run(clip, trace)
        return logits, trace.maps

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that must not decay: norms and biases."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}


# --- the backbones -----------------------------------------------------------------------------


class SelectingMViT(TokenSelecting):
    """torchvision's MViT; a place is a block. The class token is neither scored nor dropped, and the
    tokens that are left carry the position codes that they had.

    Args:
        model: torchvision's MViT, or ours around it.
        selection: what to keep.
    """

    conv_proj: nn.Module
    pos_encoding: Any
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Sequential

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        blocks = cast(Any, model).blocks
        super().__init__(model, selection, [_width(block.norm1) for block in blocks], "block")
        self.num_classes = cast(nn.Linear, self.head[1]).out_features

    def first_grid(self, clip: Tensor) -> Grid:
        return Grid(self.pos_encoding.temporal_size, *self.pos_encoding.spatial_size)

    def halves(self, place: int) -> bool:
        return place > 0 and cast(Any, self.blocks[place - 1]).pool_skip is not None

    def embed(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.conv_proj(clip)
        grid = self.first_grid(clip)
        if tuple(patches.shape[2:]) != tuple(grid):
            raise UsageError(
                f"a clip of {'x'.join(str(n) for n in clip.shape[2:])} does not fit",
                why=f"its {'x'.join(str(n) for n in patches.shape[2:])} patches are not the "
                f"{'x'.join(map(str, grid))} that the position tables are made for",
                fix="build the model for clips of that shape",
            )
        x = self.pos_encoding(rearrange(patches, "b c t h w -> b (t h w) c"))
        return _split(x, grid)

    def run_place(self, place: int, token: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
        assert token is not None
        tokens = torch.cat([token, rearrange(x, "b t h w c -> b (t h w) c")], dim=1)
        tokens, grid = self.blocks[place](tokens, tuple(x.shape[1:4]))
        return _split(tokens, Grid(*grid))

    def ends_stage(self, place: int) -> bool:
        return place + 1 == self.places or cast(Any, self.blocks[place + 1]).pool_skip is not None

    def classify(self, token: Tensor | None, x: Tensor) -> Tensor:
        assert token is not None
        return self.head(self.norm(token)[:, 0])

    def no_weight_decay(self) -> set[str]:
        """Norms, biases, position tables and the class token."""
        tables = {
            name
            for name, _ in self.named_parameters()
            if name.startswith("pos_encoding.") or ".rel_pos_" in name
        }
        return super().no_weight_decay() | tables

    def layers(self) -> list[list[str]]:
        """Patch embedding with its positions, every block with the scorers before it, head."""
        blocks = [[*self.scorers(place), f"blocks.{place}"] for place in range(self.places)]
        blocks[-1].append("norm")
        return [["conv_proj", "pos_encoding"], *blocks, ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage; each is called with tokens and their grid."""
        stages: list[list[nn.Module]] = [[]]
        for place, block in enumerate(self.blocks):
            stages[-1].append(block)
            if self.ends_stage(place) and place + 1 < self.places:
                stages.append([])
        return stages


def _split(tokens: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """``[B, 1 + T*H*W, C]`` to the class token ``[B, 1, C]`` and ``[B, T, H, W, C]``."""
    x = rearrange(
        tokens[:, 1:], "b (t h w) c -> b t h w c", t=grid.frames, h=grid.height, w=grid.width
    )
    return tokens[:, :1], x


class SelectingSwin(TokenSelecting):
    """torchvision's Video-Swin; a place is a stage, its merging comes before the selection. Frames
    that are left become neighbours: relative positions count them anew.

    Args:
        model: torchvision's SwinTransformer3d, or ours around it.
        selection: what to keep.
    """

    patch_embed: Any
    features: nn.Sequential
    norm: nn.Module
    head: nn.Linear
    pos_drop: nn.Module
    dropout: nn.Module

    def __init__(self, model: nn.Module, selection: Selection) -> None:
        stages = list(cast(Any, model).features)[::2]
        super().__init__(model, selection, [_width(stage[0].norm1) for stage in stages], "stage")
        self.num_classes = self.head.out_features

    def first_grid(self, clip: Tensor) -> Grid:
        patch = self.patch_embed.tuple_patch_size
        return Grid(*(-(-n // side) for n, side in zip(clip.shape[2:], patch, strict=True)))

    def halves(self, place: int) -> bool:
        return place > 0

    def embed(self, clip: Tensor) -> tuple[None, Tensor]:
        x = self.patch_embed(clip)
        # torchvision's own has a dropout here, ours has one before the head.
        return None, self.pos_drop(x) if hasattr(self, "pos_drop") else x

    def enter(self, place: int, x: Tensor) -> Tensor:
        return self.features[2 * place - 1](x) if place else x

    def run_place(self, place: int, token: Tensor | None, x: Tensor) -> tuple[None, Tensor]:
        return None, self.features[2 * place](x)

    def classify(self, token: Tensor | None, x: Tensor) -> Tensor:
        pooled = reduce(self.norm(x), "b t h w c -> b c", "mean")
        return self.head(self.dropout(pooled) if hasattr(self, "dropout") else pooled)

    def no_weight_decay(self) -> set[str]:
        """Norms, biases and relative position tables."""
        tables = {
            name for name, _ in self.named_parameters() if "relative_position_bias_table" in name
        }
        return super().no_weight_decay() | tables

    def layers(self) -> list[list[str]]:
        """Patch embedding, every block (the first of a stage with the merging and the scorers before
        it), head.
        """
        layers = [["patch_embed"]]
        for place, stage in enumerate(self.stage_blocks()):
            blocks = [[f"features.{2 * place}.{b}"] for b in range(len(stage))]
            if place:
                blocks[0].append(f"features.{2 * place - 1}")
            blocks[0] += self.scorers(place)
            layers += blocks
        layers[-1].append("norm")
        return [*layers, ["head"]]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage."""
        return [list(stage.children()) for stage in list(self.features)[::2]]


class SelectingOGReG(TokenSelecting):
    """OG-ReG; a place is a stage, its merging comes before the selection. A window of a frame is a
    smaller frame: Glance pools it from its own corner, Gaze sees zeros beyond its border.

    Args:
        model: the backbone.
        selection: what to keep.
    """

    stem: nn.Module
    stages: nn.ModuleList
    merges: nn.ModuleList
    norm: nn.Module
    dropout: nn.Module
    head: nn.Linear

    def __init__(self, model: OGReG, selection: Selection) -> None:
        super().__init__(model, selection, [stage.dim for stage in model.config.stages], "stage")
        self.num_classes = model.num_classes
        self._layers = model.layers()

    def first_grid(self, clip: Tensor) -> Grid:
        _, _, frames, height, width = clip.shape
        return Grid(-(-frames // 2), -(-height // 4), -(-width // 4))

    def halves(self, place: int) -> bool:
        return place > 0

    def embed(self, clip: Tensor) -> tuple[None, Tensor]:
        return None, self.stem(clip)

    def enter(self, place: int, x: Tensor) -> Tensor:
        return self.merges[place - 1](x) if place else x

    def run_place(self, place: int, token: Tensor | None, x: Tensor) -> tuple[None, Tensor]:
        return None, self.stages[place](x)

    def classify(self, token: Tensor | None, x: Tensor) -> Tensor:
        return self.head(self.dropout(reduce(self.norm(x), "b t h w c -> b c", "mean")))

    def layers(self) -> list[list[str]]:
        """OG-ReG's, with the scorers at the first block behind them."""
        firsts = {f"stages.{place}.0": self.scorers(place) for place in range(self.places)}
        return [[*layer, *firsts.get(layer[0], [])] for layer in self._layers]

    def stage_blocks(self) -> list[list[nn.Module]]:
        """The blocks of each stage."""
        return [list(stage.children()) for stage in self.stages]


def _width(norm: Any) -> int:
    """Channels that a LayerNorm takes."""
    return int(norm.normalized_shape[0])


# --- factory -----------------------------------------------------------------------------------


def select_tokens(model: nn.Module, fields: Mapping[str, Any]) -> TokenSelecting:
    """:func:`with_token_selection` by plain values, as recipes and checkpoints hold them.

    Args:
        model: see there.
        fields: of :class:`Selection`; ``time`` and ``space`` as lists of the fields of :class:`Keep`.
    """
    keeps = {
        name: tuple(Keep(**keep) for keep in fields.get(name, ())) for name in ("time", "space")
    }
    return with_token_selection(model, Selection(**{**fields, **keeps}))


def with_token_selection(model: nn.Module, selection: Selection) -> TokenSelecting:
    """A model that keeps only the tokens that it finds worth keeping.

    Published weights need no key map of their own: the backbone's (``map_torchvision``) leaves the
    scorers' names as they are, which are ours.

    Args:
        model: OG-ReG, or MViT or Video-Swin (torchvision's, or ours around them); its modules are
            shared with the result, whose weights have the same names.
        selection: what to keep.

    Raises:
        UsageError: another model, or a place that it does not have.
    """
    if isinstance(model, OGReG):
        return SelectingOGReG(model, selection)
    # Not at the top: importing torchvision costs a second.
    from torchvision.models import video

    from ogreg_core.models.torchvision_models import MViT, VideoSwin

    if isinstance(model, (video.MViT, MViT)):
        return SelectingMViT(model, selection)
    if isinstance(model, (video.SwinTransformer3d, VideoSwin)):
        return SelectingSwin(model, selection)
    raise UsageError(
        f"token_selection does not know the backbone {type(model).__name__}",
        why="it stands in OG-ReG, MViT and Video-Swin",
        fix="take model.token_selection out of the recipe",
    )
