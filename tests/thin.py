"""Variants with one block in each stage: compiling and tracing take as long as there are operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest


def one_block_a_stage(patch: pytest.MonkeyPatch, variants: dict[str, Any], name: str = "n") -> None:
    """Replace a variant, whose dataclass has ``stages`` with a ``depth`` each, while the patch lasts."""
    whole = variants[name]
    stages = tuple(replace(stage, depth=1) for stage in whole.stages)
    patch.setitem(variants, name, replace(whole, stages=stages))
