"""Entry point of ``ogreg`` and ``python -m ogreg_cli``."""

from __future__ import annotations

import io
import os
import sys

from ogreg_cli.app import app
from ogreg_cli.console import emit_json, error_document, explain, fail
from ogreg_core.errors import EnvironmentFault, LostPeer, OutOfMemory, UsageError, VideoError
from ogreg_core.launching import is_silent

_USAGE, _INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line and exit with the code that the README promises."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # File names and labels may hold what a terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="ogreg")
    except SystemExit as stop:
        if stop.code == _USAGE and "--json" in sys.argv:
            # Typer has told the person on stderr; the program gets its document too.
            emit_json(error_document(UsageError("wrong usage, see stderr", fix="ogreg --help")))
        if stop.code == _INTERRUPTED:
            # Typer leaves without a word on Ctrl-C.
            sys.exit(fail(KeyboardInterrupt()))
        raise
    except Exception as error:  # the one place where errors become sentences
        sys.exit(_fail_quietly(error) if is_silent() else fail(error))


def _fail_quietly(error: Exception) -> int:
    """Of several processes the main one speaks for all, unless something happened to another."""
    known = explain(error)
    of_its_own = isinstance(known, (VideoError, EnvironmentFault, OutOfMemory))
    if (of_its_own and not isinstance(known, LostPeer)) or known.kind == "internal":
        rank = os.environ["RANK"]
        print(f"process {rank}: error: {known}", file=sys.stderr, flush=True)  # noqa: T201
    return known.exit_code


if __name__ == "__main__":
    main()
