"""The documentation builds as a site, without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr

    def page(name: str) -> str:
        return (tmp_path / "site" / name / "index.html").read_text(encoding="utf-8")

    assert "lightning-deepr zoo publish" in page("commands") and "--input-shape" in page("commands")
    assert "check_invariants" in page("api/callbacks") and "TurnoverTarget" in page("api/callbacks")
    cards = [card.stem for card in (ROOT / "zoo" / "cards").glob("*.md")]
    assert cards and all(name in page(f"zoo/cards/{name}") for name in cards)
    assert "For whoever" in page("zoo") and "For whoever" in page("benchmarks")
    # every link of every page leads to a file of the site
    for file in (tmp_path / "site").rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', file.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|//|/", target):
                found = (file.parent / target).resolve()
                assert found.is_file() or (found / "index.html").is_file(), (file.name, target)
