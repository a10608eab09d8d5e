"""What the documents tell people to type is what the commands understand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nas_kd.arguments.distill import parse_distill
from nas_kd.arguments.rank_check import parse_rank_check
from nas_kd.arguments.space import parse_space
from nas_kd.arguments.structure import parse_structure
from nas_kd.arguments.study import parse_study
from nas_kd.arguments.worker import parse_worker

ROOT = Path(__file__).parent.parent
PARSE: dict[str, Callable[[Sequence[str]], Any]] = {
    "study": parse_study,
    "space": parse_space,
    "distill": parse_distill,
    "structure": parse_structure,
    "rank_check": parse_rank_check,
    "worker": parse_worker,
}
BLOCK = re.compile(r"```(?:bash|sh)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"python -m nas_kd\.(\w+)(.*)")


def commands() -> list[tuple[str, str, str]]:
    """(document, command, arguments) of every command in a block of shell."""
    found = []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in BLOCK.findall(document.read_text(encoding="utf-8")):
            for name, arguments in COMMAND.findall(block.replace("\\\n", " ")):
                found.append((document.name, name, arguments))
    return found


@pytest.mark.parametrize(("document", "name", "arguments"), commands())
def test_every_command_is_understood(document: str, name: str, arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAS_KD_STORAGE", "postgresql+psycopg://me@db/nas")  # as docs/workers.md says to
    words = shlex.split(arguments, comments=True)
    end = next((place for place, word in enumerate(words) if word in ("&", "&&", "|", ">", "\\")), len(words))
    PARSE[name](words[:end])


def test_there_are_commands_of_all_kinds() -> None:
    assert {name for _, name, _ in commands()} >= {"study", "distill", "rank_check"}


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_what_is_linked_is_there(document: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / document).read_text(encoding="utf-8"))
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []
