"""``ogreg models``."""

from __future__ import annotations

from ogreg_cli.common import Json
from ogreg_cli.console import emit_json, print_table

EXAMPLES = "Examples: ogreg models | ogreg models --json"


def models(json: Json = False) -> None:
    """List the models by name: usual input, parameters, GFLOPs, pretrained weights, source.

    GFLOPs are billions of multiply-adds for one view of the usual input, each counted once, as in the
    field's tables. Weights are names for `init.weights` and `ogreg convert`; files of other origin are
    taken by both, too.
    """
    from ogreg_core.models.registry import MODELS

    if json:
        rows = [
            {
                "name": name,
                "frames": entry.frames,
                "size_px": entry.size,
                "fixed_input": entry.fixed_input,
                "params_m": entry.params_m,
                "gmacs_per_view": entry.gmacs,
                "options": list(entry.options),
                "weights": list(entry.weights),
                "mean": entry.mean,
                "std": entry.std,
                "source": entry.source,
            }
            for name, entry in MODELS.items()
        ]
        emit_json({"schema": "ogreg.models.v1", "models": rows})
        return
    print_table(
        "Models (400 classes; GFLOPs are multiply-adds per view, each counted once)",
        ["name", "input", "params (M)", "GFLOPs (multiply-adds)", "options", "weights", "source"],
        [
            [
                name,
                f"{entry.frames}x{entry.size}x{entry.size}",
                f"{entry.params_m:.2f}",
                f"{entry.gmacs:g}",
                ", ".join(entry.options),
                ", ".join(entry.weights),
                entry.source,
            ]
            for name, entry in MODELS.items()
        ],
        right=(2, 3),
    )
