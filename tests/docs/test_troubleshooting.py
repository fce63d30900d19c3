"""docs/troubleshooting.md has every message of the package, every class of errors, and no other message."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.site import site_module

messages = site_module("messages")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.mark.slow  # some seconds: it reads every source
def test_the_page_has_exactly_the_messages_of_the_sources() -> None:
    listed = [line for lines in messages.listed(PAGE).values() for line in lines]
    assert len(listed) == len(set(listed)), "a message stands in two families"
    missing, gone = messages.found().keys() - set(listed), set(listed) - messages.found().keys()
    assert not missing, f"`python docs/_site/messages.py --write` adds them; say in their family what to do: {sorted(missing)}"
    assert not gone, f"`python docs/_site/messages.py --write` removes them: {sorted(gone)}"
    assert messages.UNKNOWN not in PAGE, "messages without a family: move each to the section that says what to do"


@pytest.mark.slow  # some seconds: it reads every source
def test_every_class_of_errors_is_explained() -> None:
    classes = messages.error_classes()
    assert {"FormatError", "HubError", "CorpusError", "WrongArguments"} <= set(classes)
    assert [name for name in classes if f"`{name}`" not in PAGE.split("\n## ")[0]] == []


def test_every_family_says_what_to_do() -> None:
    for section in PAGE.split("\n## ")[1:]:
        advice = section.partition("\n")[2].partition("```text")[0]
        assert len(advice.split()) >= 8, section.partition("\n")[0]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('def f(x):\n    raise ValueError(f"expected one of {x}, found {x!r}" " here.")', "expected one of …, found … here."),
        ('def f(x):\n    text = f"this is {x}"\n    raise ValueError(text if x else None)', "this is …"),
        ('def f(x):\n    rank_zero_warn("one thing" + x + " and another")', "one thing… and another"),
        ('def f(x):\n    for line in ["a b c d"]:\n        warnings.warn(line)', "a b c d"),
        ('def f(x):\n    lines = []\n    lines.append(f"a b c {x}")\n    raise E("\\n".join(lines))', "a b c …"),
    ],
)
def test_messages_are_found_however_they_are_written(source: str, found: str) -> None:
    (function,) = ast.parse(source).body
    shown = [one for node in ast.walk(function) for one in messages._shown(node)]
    texts, _ = messages.of_function(function, shown)
    assert found in {messages.plain(text) for text in texts}


@pytest.mark.slow  # some seconds: it reads every source
def test_known_messages_are_found() -> None:
    """What the search has to see: a constant of another module, a function that returns a text, an argument's check."""
    for part in (
        "second derivatives",  # compute/gather.py: TWICE, raised in six files
        "has nothing to convert",  # conversion/convert.py: returned by a function
        "has collapsed",  # algorithm/statistics.py: returned, and warned elsewhere
        "expected an int of at least",  # training/arguments.py
    ):
        assert any(part in text for text in messages.found()), part
