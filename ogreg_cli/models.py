"""``ogreg models``."""

from __future__ import annotations

from ogreg_cli.common import Json
from ogreg_cli.console import emit_json, print_table

EXAMPLES = "Examples: ogreg models | ogreg models --json"


def models(json: Json = False) -> None:
    """List the models by name: usual input, parameters, multiply-adds, source."""
    from ogreg_core.models.registry import MODELS

    if json:
        rows = [
            {
                "name": name,
                "frames": entry.frames,
                "size_px": entry.size,
                "params_m": entry.params_m,
                "gmacs_per_view": entry.gmacs,
                "options": list(entry.options),
                "source": entry.source,
            }
            for name, entry in MODELS.items()
        ]
        emit_json({"schema": "ogreg.models.v1", "models": rows})
        return
    print_table(
        "Models (400 classes; one multiply-add counts once)",
        ["name", "input", "params (M)", "GMACs per view", "options", "source"],
        [
            [
                name,
                f"{entry.frames}x{entry.size}x{entry.size}",
                f"{entry.params_m:.2f}",
                f"{entry.gmacs:g}",
                ", ".join(entry.options),
                entry.source,
            ]
            for name, entry in MODELS.items()
        ],
        right=(2, 3),
    )
