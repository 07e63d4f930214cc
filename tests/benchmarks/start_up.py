"""How long help, the version and wrong usage take, as multiples of importing typer and rich.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/start_up.py [--repeats 21]``. Each call is
a process of its own, all in turn, with a warm file cache; wall time, medians.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from tests.benchmarks.record import build_parser, finish, process_medians

BASE = "import typer, rich"
CALLS = {
    "--help": ["--help"],
    "--version": ["--version"],
    **{f"{name} --help": [name, "--help"] for name in ("profile", "predict", "train", "prepare")},
    "data show --help": ["data", "show", "--help"],
    "models": ["models"],
}


def time_in_turn(calls: Mapping[str, Sequence[str]], repeats: int) -> dict[str, float]:
    """Median seconds of calls of ogreg, and of ``BASE``.

    Args:
        calls: arguments by name.
        repeats: rounds.
    """
    commands = {BASE: [sys.executable, "-c", BASE]}
    for name, arguments in calls.items():
        commands[name] = [sys.executable, "-m", "ogreg_cli", *arguments]
    return {name: taken.wall for name, taken in process_medians(commands, repeats).items()}


def main() -> None:
    """Time the calls that a person waits for most often."""
    options = build_parser(__doc__, repeats=21).parse_args()
    seconds = time_in_turn(CALLS, options.repeats)
    results = [
        {"call": name, "ms_p50": 1000 * value, "times_base": value / seconds[BASE]}
        for name, value in seconds.items()
    ]
    finish("start_up", options, results)


if __name__ == "__main__":
    main()
