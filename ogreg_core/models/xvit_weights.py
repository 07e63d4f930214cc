"""Published checkpoints of X-ViT and of Vision Transformers: our names for theirs, and their settings.

The authors' code: https://github.com/1adrianb/video-transformers, commit 82ca176.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ogreg_core.errors import CheckpointError
from ogreg_core.models.weights import rename
from ogreg_core.models.xvit import blocks_of

__all__ = ["map_xvit", "settings_of"]

_NAMES = (
    # The authors' X-ViT; its frame encoder has timm's names.
    (r"^base_model\.", ""),
    (r"^consensus\.cls_token$", "temporal.cls_token"),
    (r"^consensus\.temporal_encoder\.0\.", "temporal.block."),
    (r"^consensus\.mlp_head\.0\.", "temporal.norm."),
    (r"^consensus\.mlp_head\.1\.", "temporal.hidden."),
    (r"^consensus\.mlp_head\.4\.", "head."),
    (r"^patch_embed\.proj\.", "patch_embed."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    # torchvision's vit_*; older files call the layers of the MLP linear_1 and linear_2.
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
    (r"^heads\.head\.", "head."),
)


def map_xvit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the weights of the authors' X-ViT, of timm's ``vit_*`` and torchvision's ``vit_*``.

    ``new_fc`` is the classifier of the average head; beside a temporal attention it is never used and
    left out. The ``pre_logits`` layer of ImageNet-21k models keeps its foreign name. Names of ours stay.
    """
    names = list(_NAMES)
    if any(name.startswith("consensus.") for name in state):
        state = {name: value for name, value in state.items() if not name.startswith("new_fc.")}
    else:
        names.append((r"^new_fc\.", "head."))
    return {rename(name, names): tensor for name, tensor in state.items()}


# Classes of the released configurations, and their segment and shift divisor.
_RELEASED = {400: (8, 8), 600: (8, 8), 174: (16, 4)}


def settings_of(state: Mapping[str, Tensor], cfg: str = "") -> dict[str, Any]:
    """What a checkpoint tells of the options of :func:`build_xvit`, by name.

    Of the weights: ``table_size``, and of an X-ViT ``time_rows`` and ``aggregation``. Segment and
    shift divisor leave no trace in them: they come from the configuration that the authors' training
    writes beside the weights, or else, for the authors' names, from the released configuration with
    as many classes (400 and 600 Kinetics, 174 Something-Something). What is not known is left out.

    Args:
        state: weights with the authors', timm's, torchvision's or our names.
        cfg: YAML text under ``cfg`` in the authors' checkpoint files.

    Raises:
        CheckpointError: not the weights of a Vision Transformer.
    """
    own = map_xvit(state)
    table, patches = own.get("pos_embed"), own.get("patch_embed.weight")
    if table is None or patches is None:
        raise CheckpointError(
            "the weights are not those of a Vision Transformer",
            why="they have no position table or no patch embedding",
            fix="choose the model that these weights belong to (`ogreg models`)",
        )
    settings: dict[str, Any] = {"table_size": math.isqrt(table.shape[1] - 1) * patches.shape[-1]}
    if "temp_embed" not in own:
        return settings
    settings["time_rows"] = own["temp_embed"].shape[1]
    attention = "temporal.cls_token" in own
    settings["aggregation"] = "attention" if attention else "average"
    classes = len(own["head.bias"]) if "head.bias" in own else 0
    if classes in _RELEASED and any(name.startswith("base_model.") for name in state):
        settings["segment"], settings["shift_divisor"] = _RELEASED[classes]
    depth = len({name.split(".")[1] for name in own if name.startswith("blocks.")})
    return {**settings, **_settings_in(cfg, depth)}


def _settings_in(cfg: str, depth: int) -> dict[str, Any]:
    """Options named in the authors' configuration."""
    settings: dict[str, Any] = {}
    for key, option in (("NUM_SEGMENTS", "segment"), ("SHIFT_DIV", "shift_divisor")):
        if match := re.search(rf"^\s*{key}:\s*(\d+)\s*$", cfg, re.MULTILINE):
            settings[option] = int(match[1])
    if re.search(r"^\s*USE_XVIT:\s*false\s*$", cfg, re.MULTILINE | re.IGNORECASE):
        return {**settings, "window": 0}
    if match := re.search(r"^\s*LOCATIONS_LIST:([\s\d,\[\]-]+)", cfg, re.MULTILINE):
        # The released lists name more blocks than there are.
        blocks = [number for number in map(int, re.findall(r"\d+", match[1])) if number < depth]
        words = ("all", "first-half", "second-half", "odd")
        fitting = (word for word in words if list(blocks_of(word, depth)) == blocks)
        settings["mixing"] = next(fitting, blocks)
    return settings
