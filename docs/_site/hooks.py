"""What the site shows beside the pages of ``docs/``: mkdocs calls these functions while it builds.

- in ``commands.md``, the command line as its parsers describe it;
- a page for every model of the zoo, which is its card;
- every file of the repository that a page links to: Markdown as a page, sources as a page with their code, pictures as they
  are.
"""

from __future__ import annotations

import json
import os
import posixpath
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import repository
from mkdocs.structure.files import File, Files

ROOT = repository.ROOT
# For whom a page of another folder is: the pages of docs/ say it themselves.
READERS = {
    "zoo/README.md": "whoever looks for a trained sparse model",
    "zoo/": "whoever wants to use this model as it is, or to train it further",
    "benchmarks/": "whoever wants to see the measurement behind a claim, and to repeat it",
    "recipes/": "whoever runs a training from the command line",
    "CHANGELOG.md": "whoever updates the package",
    "CONTRIBUTING.md": "whoever changes the package",
}
COMMANDS = [
    ("report",), ("compare",), ("export",), ("zoo", "list"), ("zoo", "info"), ("zoo", "verify"), ("zoo", "publish"),
    ("zoo", "pull"), ("recipes",),
]  # fmt: skip
PARSERS = "<!-- parsers -->"  # stands in commands.md where their help comes
_sources: dict[str, str] = {}  # {place on the site: path in the repository}


def on_config(config: Any) -> Any:
    """Give the zoo's part of the navigation its pages."""
    for entry in config.nav:
        if "Zoo" in entry:
            cards = sorted((ROOT / "zoo" / "cards").glob("*.md"))
            pages = [{"All models": "zoo/README.md"}, {"Adapters": "zoo/adapters/README.md"}]
            entry["Zoo"] = [*pages, *({card.stem: f"zoo/cards/{card.name}"} for card in cards)]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated, and what pages link to outside of ``docs/``."""
    _sources.clear()
    pending = [f"docs/{file.src_uri}" for file in files.documentation_pages() if file.generated_by is None]
    pending += ["zoo/README.md", "benchmarks/README.md", "recipes/README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
    pending += [f"zoo/cards/{card.name}" for card in (ROOT / "zoo" / "cards").glob("*.md")]
    done: set[str] = set()
    while pending:
        path = pending.pop()
        if path in done or path == "README.md" or not (ROOT / path).exists():
            continue
        done.add(path)
        site = repository.place(path)
        _sources[site] = path
        if not path.startswith("docs/"):
            if site.endswith(".md"):
                files.append(File.generated(config, site, content=page_of(path)))
            else:
                files.append(File.generated(config, site, abs_src_path=str(ROOT / path)))
        if (ROOT / path).is_dir():
            pending += [f"{path}/{name}" for name in _names(path)]
        elif path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            found = [target for target, _, _ in repository.links(text) if not repository.is_external(target)]
            pending += [repository.resolve(path, target)[0] for target in found]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to where the site has their files."""
    site = page.file.src_uri
    source = _sources.get(site)
    if site == "index.md":
        page.meta["hide"] = ["navigation", "toc"]  # the front page has the width for itself
    if site == "troubleshooting.md":
        markdown = markdown.replace("```text\n", "``` {.text .messages}\n")
    if site == "commands.md":
        markdown = markdown.replace(PARSERS, commands())
    if source is None or not site.endswith(".md") or (ROOT / source).is_dir():
        return markdown

    def target(path: str, anchor: str) -> str:
        relative = posixpath.relpath(repository.place(path), posixpath.dirname(site) or ".")
        return relative + (f"#{anchor}" if anchor else "")

    return repository.rewritten(markdown, source, target)


def page_of(path: str) -> str:
    """Write the page of a file outside of ``docs/``: Markdown as it is, a source as a block of code."""
    if (ROOT / path).is_dir():
        places = {name: posixpath.basename(repository.place(f"{path}/{name}")) for name in _names(path)}
        listed = "\n".join(f"- [`{name}`]({place})" for name, place in places.items())
        return f"# {path}\n\n*For whoever reads the source.*\n\n{listed}\n"
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        reader = next((who for folder, who in READERS.items() if path.startswith(folder)), None)
        begin, title, rest = _around_title(text)
        return text if reader is None else f"{begin}{title}\n\n*For {reader}.*\n{rest}"
    if path.endswith(".ipynb"):
        return notebook(text)
    kind = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".c": "c", ".h": "c"}.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n*For whoever reads the source.*\n\n~~~{kind}\n{text}\n~~~\n"


def notebook(text: str) -> str:
    """Write a notebook as a page: its text, and its code in blocks."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"~~~python\n{source}\n~~~")
    begin, title, rest = _around_title("\n\n".join(parts))
    return f"{begin}{title}\n\n*For whoever works in notebooks.*\n{rest}\n"


def _names(path: str) -> list[str]:
    """List the files of a folder that can be shown."""
    shown = {".md", ".ipynb", ".py", ".c", ".h", ".ld", ".yaml", ".csv", ".png", ""}
    return sorted(
        one.name for one in (ROOT / path).iterdir() if one.is_file() and one.suffix in shown and one.stem != "__init__"
    )


def _around_title(text: str) -> tuple[str, str, str]:
    lines = text.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("# "))
    return "".join(lines[:at]), lines[at].rstrip("\n"), "".join(lines[at + 1 :])


def commands() -> str:
    """Write the reference of the command line, from what each command's parser says."""
    parts = [f"```text\n{help_of()}\n```\n"]
    for command in COMMANDS:
        parts.append(f"## lightning-deepr {' '.join(command)}\n\n```text\n{help_of(*command)}\n```\n")
    return "\n".join(parts)


def help_of(*command: str) -> str:
    """Ask a command for its help, in 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    call = [sys.executable, "-m", "lightning_deepr.commands.main", *command, "--help"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode != 0 or "usage" not in done.stdout:
        raise RuntimeError(f"{' '.join(call)}: expected its help, found exit status {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.strip()
