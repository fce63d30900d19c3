"""Where the links of the project's Markdown files lead: paths of the repository, and places of the site.

Pages are written for readers of the repository: a link is relative to the file that has it. The site has ``docs/`` as its root,
and everything else (the zoo's cards, the benchmarks, sources) under its path in the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?P<head>!?\[(?:[^\]\[`]|`[^`]*`|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)")
_CODE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(`+)(?!`)((?:[^\n]|\n(?!\n))+?)(?<!`)\1(?!`)")


def without_code(text: str) -> str:
    """Blank out code and comments; the length stays, and so do the marks of code within a line."""
    for pattern in (_CODE, re.compile(r"<!--.*?-->", re.DOTALL)):
        text = pattern.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    return _INLINE.sub(lambda found: found[1] + re.sub(r"[^\n]", " ", found[2]) + found[1], text)


def links(text: str) -> Iterator[tuple[str, int, int]]:
    """Find the links of a Markdown text outside of code: the target, and where it begins and ends."""
    for found in _LINK.finditer(without_code(text)):
        yield found["target"], found.start("target"), found.end("target")


def is_external(target: str) -> bool:
    """Whether a target names a scheme, such as ``https:``."""
    return re.match(r"[a-z][a-z+.-]*:", target) is not None


def resolve(source: str, target: str) -> tuple[str, str]:
    """Find the path in the repository, and the anchor, of a link in the file ``source`` (a path of the repository)."""
    path, _, anchor = target.partition("#")
    if not path:
        return source, anchor
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), anchor


def place(path: str) -> str:
    """Find the place on the site of a path of the repository."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        readme = f"{path}/README.md"
        return readme if (ROOT / readme).is_file() else f"{path}/index.md"
    return path if path.endswith((".md", ".png", ".svg", ".csv", ".gif")) else path + ".md"  # sources become pages


def rewritten(text: str, source: str, of_target: Callable[[str, str], str]) -> str:
    """Put ``of_target(path, anchor)`` in the place of every relative link."""
    for target, begin, end in sorted(links(text), key=lambda one: -one[1]):
        if not is_external(target):
            text = text[:begin] + of_target(*resolve(source, target)) + text[end:]
    return text


def slug(heading: str) -> str:
    """Write the anchor of a heading, as GitHub and the site do."""
    heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip())


def anchors(text: str) -> set[str]:
    """List the anchors of a Markdown text."""
    shown = _CODE.sub("", text)
    return {slug(line) for line in re.findall(r"^#+ +(.+?) *#*$", shown, re.MULTILINE)}
