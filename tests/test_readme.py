"""The examples of the README run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from d3net.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON_EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^(?:d3net|make) [^#\n]*", README, re.MULTILINE)


def test_there_are_examples() -> None:
    assert len(PYTHON_EXAMPLES) == 3
    assert any(command.startswith("d3net demo") for command in COMMANDS)


@pytest.mark.parametrize("example", PYTHON_EXAMPLES, ids=["operation", "module", "networks"])
def test_python_example(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("d3net")])
def test_command_is_accepted(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help ends the parsing of what stands in front of it, once that has been accepted."""
    with pytest.raises(SystemExit) as stopped:
        main([*shlex.split(command)[1:], "--help"])
    assert stopped.value.code == 0
    assert "usage: d3net" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_target_exists(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_linked_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
