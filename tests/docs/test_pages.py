"""The pages of the documentation: links, what each says at its top, the README's length, and what must be complete."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import lightning_deepr
from lightning_deepr import adapters, export, hub, pictures, zoo
from tests.helpers.paths import ROOT
from tests.helpers.site import PAGES, blocks_of, site_module, title_of

repository = site_module("repository")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Markdown beside the documentation whose links have to hold, too.
BESIDE = [
    *[
        ROOT / name
        for name in ("CONTRIBUTING.md", "CHANGELOG.md", "zoo/README.md", "recipes/README.md", "examples/c/README.md")
    ],
    *sorted((ROOT / "benchmarks").rglob("*.md")),
    *sorted((ROOT / "zoo" / "cards").glob("*.md")),
]


@pytest.mark.parametrize("page", [*PAGES, *BESIDE], ids=title_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, _, _ in repository.links(text):
        if repository.is_external(target):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]{2,}(/\S*)?|mailto:\S+@\S+", target), f"no address: {target}"
            continue
        path, anchor = repository.resolve(title_of(page), target)
        assert (ROOT / path).exists(), f"{target}: nothing is at {path}"
        if anchor:
            assert path.endswith(".md") and anchor in repository.anchors((ROOT / path).read_text(encoding="utf-8")), target


def test_the_reader_of_links_finds_them() -> None:
    text = "[a](b.md#c) `[no](x.md)` ![p](q.png)\n\n```text\n[no](x.md)\n```\n[`code`](d.md) [![i](j.png)](k.md)\n"
    assert {target for target, _, _ in repository.links(text)} >= {"b.md#c", "q.png", "d.md"}
    assert "x.md" not in {target for target, _, _ in repository.links(text)}
    assert repository.resolve("docs/api/a.md", "../../zoo/README.md#x") == ("zoo/README.md", "x")
    assert repository.anchors("# One K for `a` network\n```text\n# no\n```\n") == {"one-k-for-a-network"}
    assert (
        repository.rewritten("[a](b.md) [c](https://x.org)", "docs/d.md", lambda p, a: p) == "[a](docs/b.md) [c](https://x.org)"
    )


@pytest.mark.parametrize("page", PAGES[1:], ids=title_of)
def test_a_page_says_for_whom_it_is(page: Path) -> None:
    title, blank, reader = page.read_text(encoding="utf-8").splitlines()[:3]
    assert title.startswith("# ") and blank == "" and reader.startswith("*For ") and re.search(r"\*$|[.,:;\w]$", reader)


def test_the_site_has_every_page() -> None:
    """A page that the navigation lacks would be found by nobody."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^ +- (?:[^:\n]+: )?([\w./-]+\.md)$", text, re.MULTILINE))
    here = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}
    assert here <= named, here - named
    assert all((ROOT / "docs" / name).is_file() or (ROOT / name).is_file() for name in named)


def test_the_front_page_is_short() -> None:
    assert len(README.split()) <= 700
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1, "one picture"
    assert len(re.findall(r"^\|[-|: ]+\|$", README, re.MULTILINE)) == 1, "one table"
    (diff,) = [block for block in blocks_of(ROOT / "README.md") if block.language == "diff"]
    assert sum(line.startswith("+") for line in diff.code.splitlines()) == 1


def test_every_public_name_has_its_place_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if "/api/" in page.as_posix())
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}
    public = {*lightning_deepr.__all__, *zoo.__all__, *hub.__all__, *pictures.__all__, *adapters.__all__}
    public |= {name for name in export.__all__ if name.startswith("to_") and name != "to_c_training"}
    # modules and values have no docstring of their own; aliases stand under their first name
    public -= {"__version__", "zoo", "pictures", "adapters", "ENTRIES", "WEIGHTS", "save"}
    assert public <= shown, public - shown


def test_the_algorithm_has_the_lines_of_the_source() -> None:
    page = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    source = (ROOT / "lightning_deepr" / "training" / "backends.py").read_text(encoding="utf-8")
    (excerpt,) = [block.code for block in blocks_of(ROOT / "docs" / "algorithm.md") if "backends.py" in block.not_run]
    assert textwrap.indent(excerpt, "    ") in source
    for name in re.findall(r"\| `(\w+)\(", page):
        assert re.search(
            rf"^def {name}\(", (ROOT / "lightning_deepr/algorithm/rewiring.py").read_text(encoding="utf-8"), re.M
        ), name
