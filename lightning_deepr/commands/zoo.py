"""The command ``lightning-deepr zoo list|info|verify|publish|pull``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_deepr import zoo
from lightning_deepr.conversion.report import ConnectivityReport
from lightning_deepr.conversion.table import table
from lightning_deepr.recipes.running import data_of_recipe

_COLUMNS = ("name", "connections", "K / N", "metric", "bytes")


def run(arguments: Sequence[str]) -> None:
    """Run the command.

    Args:
        arguments: arguments after ``zoo``.

    Raises:
        SystemExit: the arguments are wrong, there is no such model, or a model is not as recorded.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-deepr zoo", description="List, describe and verify sparse models: the zoo's, and files of zoo.save."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="list the models of the zoo")
    command.add_argument("pattern", nargs="?", default="*", help="shell wildcards, as in 'lenet300_100.*'")
    command.add_argument("--sort", choices=list(_ORDERS), default="name", help="the order (default: name; metric: best first)")
    command.add_argument("--task", help="only models for image-classification, audio-classification or text-generation")
    command.add_argument("--connectivity", type=float, metavar="SHARE", help="only models of at most this connectivity")
    command.add_argument("--max-bytes", type=int, metavar="N", help="only files of at most this size")
    command.add_argument("--json", action="store_true", help="print the records as JSON")
    command = commands.add_parser("info", help="show the record of a model")
    command.add_argument("model", help="a name of the zoo, or a file")
    command.add_argument("--json", action="store_true", help="print the whole record as JSON")
    command = commands.add_parser("verify", help="check that models are as recorded")
    command.add_argument("models", nargs="*", help="names of the zoo, or files (default: the whole zoo)")
    command.add_argument(
        "--data",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="also measure the recorded metric, on the test set of the recorded recipe in this folder "
        "(without FOLDER: the recipe's folder)",
    )
    command.add_argument("--json", action="store_true", help="print the checks as JSON")
    commands.add_parser("publish", help="publish a model on the Hugging Face Hub", add_help=False)
    commands.add_parser("pull", help="download a model's file from the Hugging Face Hub", add_help=False)
    if arguments and arguments[0] in ("publish", "pull"):
        from lightning_deepr.commands import hub

        {"publish": hub.publish, "pull": hub.pull}[arguments[0]](arguments[1:])
        return
    given = parser.parse_args(arguments)
    try:
        if given.command == "list":
            names = zoo.list_models(given.pattern, task=given.task, connectivity=given.connectivity, max_bytes=given.max_bytes)
            found = {name: zoo.info(name) for name in names}
            found = dict(sorted(found.items(), key=lambda item: _ORDERS[given.sort](item[1])))  # equal ones stay by name
            print(json.dumps(found, indent=2) if given.json else _listing(found))
        elif given.command == "info":
            found = zoo.info(given.model)
            print(json.dumps(found, indent=2) if given.json else _describe(found))
        else:
            _verify(*_models_and_folder(given.models, given.data), as_json=given.json)
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"lightning-deepr zoo {given.command}: {error}") from error


def _models_and_folder(models: list[str], data: str | None) -> tuple[list[str], str | None]:
    """Separate models and folder: in ``--data MODEL``, argparse takes the model for the folder."""
    if data and (data in zoo.list_models() or Path(data).is_file()):
        models, data = [*models, data], ""
    return models or zoo.list_models(), data


def _verify(models: Sequence[str], folder: str | None, as_json: bool = False) -> None:
    """Verify each model, and report all failures at the end.

    Args:
        models: names or paths.
        folder: folder of the data; "": the recipe's folder; None: verify without data.
        as_json: whether to print JSON, with the failures.

    Raises:
        ValueError: a model is not as recorded, or can't be read.
    """
    failures = []
    passed: dict[str, dict[str, str]] = {}
    for model in models:
        try:
            found = zoo.verify(model, None if folder is None else data_of_recipe(zoo.info(model), folder))
            passed[model] = dict(found.checks)
            if not as_json:
                print(found)
        except (OSError, ValueError, RuntimeError) as error:
            failures.append(f"{model}: {error}".replace("--data.root", "--data"))  # this command's name of the recipes' option
    if as_json:
        print(json.dumps({"as_recorded": passed, "failures": failures}, indent=2))
    if failures:
        raise ValueError("\n".join(failures))
    if as_json:
        return
    print(f"{len(models)} models are as recorded." if models else "There are no models in the zoo.")


def _listing(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Format a table of models."""
    rows, kinds = [], dict[str, None]()
    for name, info in found.items():
        connectivity = info["connectivity"]
        metric, value = next(iter(_metrics(info).items()), ("", None))
        kinds |= {metric: None} if metric else {}
        shown = "-" if value is None else f"{value:.4g}"
        rows.append((name, f"{connectivity['active']:,}", f"{connectivity['connectivity']:.2%}", shown, f"{info['bytes']:,}"))
    if not rows:
        return "no such model. lightning-deepr zoo list shows all." if zoo.list_models() else "There are no models in the zoo."
    listed = table(_COLUMNS, rows, right=_COLUMNS[1:])
    return f"{listed}\nmetric: {', '.join(kinds)}" if kinds else listed


def _metrics(info: Mapping[str, Any]) -> dict[str, float]:
    metrics = info.get("metrics")
    found = {key: one.get("value") if isinstance(one, Mapping) else one for key, one in dict(metrics or {}).items()}
    return {key: one for key, one in found.items() if isinstance(one, (int, float)) and not isinstance(one, bool)}


_ORDERS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "name": lambda info: 0.0,
    "bytes": lambda info: info["bytes"],
    "connections": lambda info: info["connectivity"]["active"],
    "connectivity": lambda info: info["connectivity"]["connectivity"],
    "metric": lambda info: -next(iter(_metrics(info).values()), -1.0),
}


def _describe(info: Mapping[str, Any]) -> str:
    """Format the record of a model as text."""
    rows = [{"l1": None, "lr_scale": None, **row, "compute": "-"} for row in info["connectivity"]["rows"]]
    lines = [f"{info['name']}", "", str(ConnectivityReport(rows, info["connectivity"]["left_out"])), ""]
    own = [key for key in info if key not in ("name", "connectivity")]
    width = max(map(len, own))
    for key in own:
        value = info[key]
        if isinstance(value, Mapping) and value:
            lines.append(f"{key}:")
            inner = max(len(str(name)) for name in value)
            lines += [f"  {str(name).ljust(inner)}  {_text(content)}" for name, content in value.items()]
        elif value not in ({}, None):
            lines.append(f"{key.ljust(width)}  {_text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)
