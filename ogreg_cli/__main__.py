"""Entry point of ``ogreg`` and ``python -m ogreg_cli``."""

from __future__ import annotations

import io
import os
import sys

from ogreg_cli.app import app
from ogreg_core.launching import is_launched, is_silent

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
        _explain_exit(stop.code)
        raise
    except Exception as error:  # the one place where errors become sentences
        # Imported late, here and below: help never needs it.
        from ogreg_cli.console import fail

        code = _fail_quietly(error) if is_silent() else fail(error)
        if is_launched():
            _leave_at_once(code)
        sys.exit(code)


def _leave_at_once(code: int) -> None:
    """End one of several processes without taking torch down in an orderly way: its communication aborts a
    process whose peers leave meanwhile, and the job would report that instead of what happened.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain_exit(code: object) -> None:
    """Say what Typer, which leaves on its own after these, does not say."""
    if code == _USAGE and "--json" in sys.argv:
        from ogreg_cli.console import emit_json, error_document
        from ogreg_core.errors import UsageError

        # Typer has told the person on stderr; the program gets its document too.
        emit_json(error_document(UsageError("wrong usage, see stderr", fix="ogreg --help")))
    if code == _INTERRUPTED:
        from ogreg_cli.console import fail

        # Typer leaves without a word on Ctrl-C.
        sys.exit(fail(KeyboardInterrupt()))


def _fail_quietly(error: Exception) -> int:
    """Of several processes the main one speaks for all, unless something happened to another."""
    from ogreg_cli.console import explain
    from ogreg_core.errors import EnvironmentFault, LostPeer, OutOfMemory, VideoError

    known = explain(error)
    of_its_own = isinstance(known, (VideoError, EnvironmentFault, OutOfMemory))
    if (of_its_own and not isinstance(known, LostPeer)) or known.kind == "internal":
        rank = os.environ["RANK"]
        print(f"process {rank}: error: {known}", file=sys.stderr, flush=True)  # noqa: T201
    return known.exit_code


if __name__ == "__main__":
    main()
