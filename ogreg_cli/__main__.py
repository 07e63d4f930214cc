"""Entry point of ``ogreg`` and ``python -m ogreg_cli``."""

from __future__ import annotations

import sys

from ogreg_cli.app import app
from ogreg_cli.console import fail


def main() -> None:
    """Run the command line and exit with the code that the README promises."""
    try:
        app(prog_name="ogreg")
    except BrokenPipeError:
        # `ogreg ... | head`: the reader has seen enough.
        sys.stderr.close()
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the one place where errors become sentences
        sys.exit(fail(error))


if __name__ == "__main__":
    main()
