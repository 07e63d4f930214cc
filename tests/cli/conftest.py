from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Ogreg = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ogreg(tmp_path: Path) -> Ogreg:
    """Run the real command line in a folder of its own."""

    def run(*arguments: str | Path, stdin: str | None = None, **environment: str):
        return subprocess.run(
            [sys.executable, "-m", "ogreg_cli", *map(str, arguments)],
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "OGREG_HOME": str(tmp_path / "home"), **environment},
        )

    return run
