"""Writes cards and pictures of models: ``python -m lightning_deepr.zoo.write_cards FOLDER [NAME_OR_PATH ...]``.

Without names it writes those of the whole zoo.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_deepr import zoo
from lightning_deepr.hub.cards import card
from lightning_deepr.hub.pictures import draw
from lightning_deepr.zoo.describing import describe


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``NAME.md`` and ``NAME.png`` for each model."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_deepr.zoo.write_cards", description="Cards and pictures of models."
    )
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("models", nargs="*", help="names of the zoo or paths (default: the whole zoo)")
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    for model in given.models or zoo.list_models():
        info = describe(model)
        picture = draw(zoo.connections_of(model), given.folder / f"{info['name']}.png", title=info["name"])
        written = given.folder / f"{info['name']}.md"
        written.write_text(card(info, picture=picture.name), encoding="utf-8")
        print(f"{written} {picture}")


if __name__ == "__main__":
    main()
