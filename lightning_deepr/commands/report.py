"""The command ``lightning-deepr report X [Y] [--html PAGE] [--json]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from lightning_deepr.commands.page import page
from lightning_deepr.commands.sources import Source, lines_of, open_source, short
from lightning_deepr.conversion.table import table


def report(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2, the arguments are wrong; with status 1, a network can't be read or the page not written.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-deepr report", description="The connectivity of a trained network, without its class."
    )
    parser.add_argument(
        "networks",
        nargs="+",
        metavar="X",
        help="one or two of: a run's folder, a sparse file, a checkpoint (.ckpt, .pt, .pth), a model of the zoo, or owner/name "
        "on the Hub",
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page for a browser, without anything from outside")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    given = parser.parse_args(arguments)
    if len(given.networks) > 2:
        parser.error(f"expected one or two networks, found {len(given.networks)}.")
    try:
        sources = [open_source(name) for name in given.networks]
        if given.html is not None:
            given.html.parent.mkdir(parents=True, exist_ok=True)
            given.html.write_text(page(sources), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-deepr report: {error}") from error
    if given.json:
        found = [one.to_dict() for one in sources]
        print(json.dumps(found[0] if len(found) == 1 else found, indent=2, default=str))
    elif given.html is not None:
        print(f"{given.html}: {given.html.stat().st_size:,} bytes")
    else:
        print("\n\n".join(text(one, titled=len(sources) > 1) for one in sources))


def text(source: Source, titled: bool = False) -> str:
    """Write a network's connectivity, its metrics and what made it."""
    parts = [f"{source.name} ({source.kind})"] if titled else []
    parts.append(str(source.report) if len(source.report) else "Nothing is sparse: all weights are dense.")
    rows: list[tuple[str, ...]] = [(key, f"{value:.5g}") for key, value in source.metrics.items()]
    for key, value in source.settings.items():
        rows += lines_of(key, short(value), width=54)
    return "\n".join([*parts, *(["", table(("", "value"), rows)] if rows else [])])
