"""The README keeps its word: its commands exist, CI runs its test command, its paths are there."""

from __future__ import annotations

import re
from pathlib import Path

from ogreg_core.models.registry import MODELS
from ogreg_core.recipe import builtin_recipes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_calls_the_test_command_of_the_readme():
    command = "pip install -e '.[test]' && pytest"
    assert f"```sh\n{command}\n```" in README
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_recipes_and_models_named_exist():
    for name in re.findall(r"recipes/([\w-]+)\.toml", README):
        assert name in builtin_recipes()
    for name in re.findall(r"ogreg-[a-z]\b", README):
        assert name in MODELS


def test_commands_named_exist():
    from ogreg_cli.app import app

    known = {command.name for command in [*app.registered_commands, *app.registered_groups]}
    used = set(re.findall(r"`ogreg ([a-z][a-z-]+)", README))
    assert used
    assert used <= known
