"""The pages of the documentation, their blocks of code, and the modules of ``docs/_site`` that the site is built with."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tests.helpers.paths import ROOT


def site_module(name: str) -> ModuleType:
    """Import a module of ``docs/_site``, which is no package."""
    key = f"docs_site_{name}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / "docs" / "_site" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def title_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        page: the page's path in the repository.
        line: the line of its first line of code.
        language: what the page calls it, such as ``python``.
        code: its text, without the indentation of the block.
        first: code that runs before it and is not shown: ``<!-- run first: ... -->``.
        not_run: why it is not run, ``<!-- not run: reason -->``; "": it runs.
        needs: a program without which it is skipped, ``<!-- needs: cc -->``.
    """

    page: str
    line: int
    language: str
    code: str
    first: str = ""
    not_run: str = ""
    needs: str = ""


_NOTE = r"^[ ]*<!-- (?P<kind>run first|not run|needs):\s(?P<note>.*?)-->[ ]*$"
_FENCE = r"^(?P<indent>[ ]*)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$"


def blocks_of(page: Path) -> list[Block]:
    """Read the blocks of code of a page, in order. A note belongs to the next block."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    notes: dict[str, str] = {}
    for part in re.finditer(f"{_NOTE}|{_FENCE}", text, re.MULTILINE | re.DOTALL):
        if part["kind"]:
            notes[part["kind"]] = textwrap.dedent(part["note"]).strip()
            continue
        line = text[: part.start("code")].count("\n") + 1
        code = textwrap.dedent(part["code"])
        noted = {"first": notes.get("run first", ""), "not_run": notes.get("not run", ""), "needs": notes.get("needs", "")}
        found.append(Block(title_of(page), line, part["language"], code, **noted))
        notes = {}
    assert not notes, f"{page}: a note without a block after it: {notes}"
    return found
