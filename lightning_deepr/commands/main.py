"""The command line ``lightning-deepr``: trainings and tests by recipes, reports, comparisons, the zoo and exports."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_deepr._version import __version__
from lightning_deepr.conversion.table import WIDTH
from lightning_deepr.recipes.refusals import is_refusal, nearest, refuse
from lightning_deepr.recipes.running import TRAINING, packaged_recipes, train

COMMANDS = ("fit", "validate", "test", "predict", "report", "compare", "zoo", "export", "recipes")
_USAGE = """\
usage: lightning-deepr fit --config NAME|PATH [--out DIR] [--model.lr 0.1 --sparsity.connectivity 0.05 ...]
       lightning-deepr fit --resume RUN
       lightning-deepr test|validate|predict RUN|CHECKPOINT
       lightning-deepr report X [Y] [--html PAGE] [--json]
       lightning-deepr compare A B [--json]
       lightning-deepr zoo list|info|verify|publish|pull ...
       lightning-deepr export CHECKPOINT --to dense|csr|onnx|c --out PATH [--module CLASS]
       lightning-deepr recipes [--json]
       lightning-deepr --version

exit status: 0 done, 1 failed, 2 wrong arguments
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command ``lightning-deepr``.

    Args:
        arguments: arguments of the command line; None: those of ``sys.argv``.

    Raises:
        SystemExit: the command is unknown or fails. The message says why.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    try:
        with _classes_of_this_folder():
            _run(command, rest)
    except ImportError as error:
        if "pip install" in str(error):  # a library that is missing, and what to do: without the calls that led to it
            raise SystemExit(f"lightning-deepr {command}: {error}") from error
        raise


@contextmanager
def _classes_of_this_folder() -> Iterator[None]:
    """Make a class in a file of the current folder importable, as ``python -m`` does and an installed program does not.

    The folder comes last: a file there shadows no library.
    """
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _run(command: str, rest: list[str]) -> None:
    if command in TRAINING:
        _train([command, *rest])
    elif command == "report":
        from lightning_deepr.commands.report import report

        report(rest)
    elif command == "compare":
        from lightning_deepr.commands.compare import compare

        compare(rest)
    elif command == "export":
        from lightning_deepr.commands.export import export

        export(rest)
    elif command == "zoo":
        from lightning_deepr.commands.zoo import run

        run(rest)
    elif command == "recipes":
        _recipes(rest)
    elif command in ("--version", "-V"):
        print(f"lightning-deepr {__version__}")
    elif command in ("-h", "--help"):
        print(f"{_USAGE}\nrecipes: {', '.join(packaged_recipes())}")
    else:
        near = nearest(command, COMMANDS)
        known = f"expected {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}, found {command!r}."
        refuse(known, f"The nearest is {near}." if near else "", "`lightning-deepr --help` shows how each is called.")


def _train(arguments: Sequence[str]) -> None:
    """Run a training or a test; a check that fails is one message, without the calls that led to it."""
    try:
        train(arguments)
    except ValueError as error:
        if is_refusal(error):
            raise SystemExit(f"lightning-deepr {arguments[0]}: {error}") from error
        raise


def _recipes(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="lightning-deepr recipes", description="List the recipes.")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    given = parser.parse_args(arguments)
    found = {
        name: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()
        for name, path in packaged_recipes().items()
    }
    if given.json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found)) + 2
    for name, what in found.items():
        print(textwrap.fill(f"{name:{width}s}{what}", WIDTH, subsequent_indent=" " * width))


if __name__ == "__main__":
    main()
