"""Every block of code of the README and of docs/ runs: those of a page in their order, in one namespace and one new folder.

A block that can't run here says why, ``<!-- not run: reason -->``. What a fragment needs, and need not be seen, stands
in ``<!-- run first: ... -->``.

    python -m tests.docs.test_snippets    counts the blocks
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_deepr.conversion import kinds
from tests.helpers.paths import ROOT
from tests.helpers.site import PAGES, Block, blocks_of, title_of

RUN = ("python", "bash")
OTHERS = {"text", "diff", "bibtex", "c", "yaml"}  # c: excerpts and headers; the tests of the exports compile what they write
# About a second or less each, once the kernels are compiled.
QUICK = ("algorithm", "choosing", "connectivity", "copies", "loops", "methods", "moving", "statistics", "theory")
FAST = {f"docs/{name}.md" for name in QUICK}
MOST_NOT_RUN = 14


def pages() -> list[Any]:
    """List the pages that have something to run. Those that take more than a second are slow tests."""
    found = []
    for page in PAGES:
        if any(block.language in RUN and not block.not_run for block in blocks_of(page)):
            marks = [] if title_of(page) in FAST else [pytest.mark.slow]
            found.append(pytest.param(page, id=title_of(page), marks=marks))
    return found


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the shell ``python`` and ``lightning-deepr``: those that run this test, with the package of this checkout."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, call in (("python", ""), ("lightning-deepr", "-m lightning_deepr.commands.main")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), os.environ.get("PATH", "")]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return folder


def run_python(block: Block, code: str, namespace: dict[str, Any]) -> None:
    lines = "\n" * (block.line - 1)  # a traceback has the line of the page
    exec(compile(lines + code, str(ROOT / block.page), "exec"), namespace)


@pytest.mark.parametrize("page", pages())
def test_the_code_of_a_page_runs(
    page: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(kinds, "_registered", kinds._registered.copy())  # a page registers a layer of its own
    namespace: dict[str, Any] = {"__name__": "__main__"}
    modules, threads = set(sys.modules), torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in blocks_of(page):
                if block.not_run or block.language not in RUN or (block.needs and shutil.which(block.needs) is None):
                    continue
                if block.first:
                    run_python(block, block.first, namespace)
                if block.language == "python":
                    run_python(block, block.code, namespace)
                else:
                    done = subprocess.run(["bash", "-ec", block.code], capture_output=True, text=True, timeout=1200)
                    assert done.returncode == 0, (
                        f"{block.page}, line {block.line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
                    )
    finally:
        torch.set_num_threads(threads)
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]  # another page may write a module of the same name


def test_blocks_that_do_not_run_say_why_and_are_few() -> None:
    blocks = [block for page in PAGES for block in blocks_of(page)]
    assert {block.language for block in blocks} <= OTHERS | set(RUN)
    left_out = [block for block in blocks if block.language in RUN and block.not_run]
    assert all(len(block.not_run.split()) >= 4 for block in left_out), left_out
    assert len(left_out) <= MOST_NOT_RUN, [(block.page, block.line) for block in left_out]
    assert not [block for block in blocks if block.first and block.not_run]


def test_yaml_can_be_read() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            if block.language == "yaml":
                assert isinstance(yaml.safe_load(block.code), dict), (block.page, block.line)


if __name__ == "__main__":
    everything = [block for page in PAGES for block in blocks_of(page)]
    counts = collections.Counter((block.language, bool(block.not_run)) for block in everything)
    for language in RUN:
        print(f"{language}: {counts[language, False]} blocks run, {counts[language, True]} do not")
    for block in everything:
        if block.not_run:
            print(f"    {block.page}:{block.line}: {block.not_run}")
