"""What the command line says about wrong arguments: three lines with the nearest name, and exit status 2."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_NOISE = re.compile(r"Does not validate against|Subtypes: |Errors:$|Given value|Problem with given class_path|Parser key ")

_CLASSES = {
    "model": "lightning_deepr.recipes.classifier.DigitClassifier",
    "data": "lightning_deepr.recipes.digits.MNISTDataModule",
    "sparsity": "lightning_deepr.DeepR",
}


class WrongArguments(SystemExit):
    """The command line is wrong. The exit status is 2, as argparse's; the message was printed."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message

    def __str__(self) -> str:
        return self.message


def refuse(*lines: str, command: str = "") -> NoReturn:
    """Print a message and end with exit status 2.

    Args:
        lines: the message.
        command: the subcommand.

    Raises:
        WrongArguments: always.
    """
    first, *others = [line for line in lines if line]
    message = "\n".join([f"lightning-deepr{' ' * bool(command)}{command}: {first}", *others])
    print(message, file=sys.stderr)
    raise WrongArguments(message)


def is_refusal(error: BaseException, *packages: str) -> bool:
    """Whether an error is a check that failed, of this package or of another that is named: its message says what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1].filename.replace(os.sep, "/") if frames else ""
    return any(f"/{package}/" in where for package in ("lightning_deepr", *packages))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a name, or "" if none is."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else ""


def refuse_parsed(message: str, parser: Any, command: str) -> NoReturn:
    """Explain an error of jsonargparse in three lines: the wrong key or value, the nearest name, where to find all.

    Args:
        message: the error.
        parser: the parser that found it.
        command: the subcommand.

    Raises:
        WrongArguments: always.
    """
    keys = re.findall(r"Parser key \"([^\"]+)\"", message)
    head = keys[0] if keys else ""
    if found := re.search(r"unrecognized arguments: (--?)([\w.+-]+)|(?:Key|accept option) [\"']([\w.+-]+)[\"']", message):
        key, known = found[2] or found[3], _keys_of(parser)
        key = ".".join([head, key]) if head and not key.startswith(head) else key
        refuse(f"--{key}: no such setting.", _near(key, known), _all_settings(command), command=command)
    if found := re.search(r"Option '([\w.+-]+)' is not accepted|Unexpected (?:init )?key[^'\"]*['\"]([\w.+-]+)", message):
        key, owner = found[1] or found[2], re.findall(r"class_path '([\w.]+)'", message)
        known = _settings_of(owner[-1]) if owner else []
        line = f"--{head}.{key}: {owner[-1].rpartition('.')[2] if owner else head} has no such setting."
        refuse(line, _near(f"{head}.{key}", [f"{head}.{one}" for one in known]), _all_settings(command, head), command=command)
    key = ".".join(dict.fromkeys(keys))
    value = re.findall(r"(?:Got value|Given value): (?!NestedArg)(?!Namespace)(.*)", message)
    expected = [_plain_type(one) for one in re.findall(r"Expected an? (<class '[\w.]+'>)", message)]
    expected = [one for one in dict.fromkeys(expected) if one != "null" or len(keys) == 1]
    leaf = [line.strip(" -") for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    own = next((line for line in leaf if "expected" in line and "found" in line), "")
    if "dot import path" in message and value:
        example = f"Give its full name, such as {_CLASSES.get(head, 'package.module.Class')}."
        refuse(f"--{key}: expected a class, found {value[0]!r}.", example, _all_settings(command, head), command=command)
    if key and value and set(expected) - {"null"} and not own:
        first = f"--{key}: expected {' or '.join(expected)}, found {value[0]!r}."
        refuse(first, "", _all_settings(command, head), command=command)
    text = own or next((line for line in leaf if not line.startswith("Expected a <class 'NoneType'>")), message)
    refuse(f"--{key}: {text}" if key else text, _near_value(own), _all_settings(command, head), command=command)


def refuse_value(message: str, command: str) -> NoReturn:
    """The same for a value that the class of a setting refuses.

    Raises:
        WrongArguments: always.
    """
    leaf = [line.strip(" -") for line in message.splitlines() if line.strip() and not _NOISE.search(line)]
    own = next((line for line in leaf if "expected" in line), leaf[0] if leaf else message)
    refuse(own, _near_value(own), _all_settings(command), command=command)


def _near(key: str, known: Sequence[str]) -> str:
    found = nearest(key, known) or next((one for one in known if one.rpartition(".")[2] == key.rpartition(".")[2]), "")
    return f"The nearest is --{found}." if found else ""


def _near_value(message: str) -> str:
    """Find the nearest of the values that one of our own messages lists."""
    parts = re.search(r"expected (?:one of )?(.*), found ['\"]([\w-]+)['\"]", message)
    found = nearest(parts[2], re.findall(r"[\w-]+", parts[1])) if parts else ""
    return f"The nearest is {found}." if found else ""


def _all_settings(command: str, head: str = "") -> str:
    of = f" (those of `{head}`: --{head}.help)" if head in ("model", "data", "sparsity") else ""
    return f"`lightning-deepr {command or 'fit'} --help` lists all settings{of}."


def _plain_type(text: str) -> str:
    inner = re.fullmatch(r"<class '([\w.]+)'>", text)
    name = inner[1].rpartition(".")[2] if inner else text
    return "null" if name == "NoneType" else name


def _keys_of(parser: Any) -> list[str]:
    """List the settings that a parser has, with those of classes of the recipes."""
    found: list[str] = []
    for action in parser._actions:
        if isinstance(action.choices, dict):  # the subcommands: an error in a file of the configuration comes from their parser
            found += [own.dest for sub in action.choices.values() for own in sub._actions]
        found.append(action.dest)
    from lightning_deepr import methods
    from lightning_deepr.recipes.classifier import DigitClassifier
    from lightning_deepr.recipes.digits import MNISTDataModule

    for key, kind in (("model", DigitClassifier), ("data", MNISTDataModule), ("sparsity", methods.DeepR)):
        found += [f"{key}.{name}" for name in inspect.signature(kind).parameters]
    return found


def _settings_of(path: str) -> list[str]:
    module, _, name = path.rpartition(".")
    owner = getattr(sys.modules.get(module), name, None)
    return [] if owner is None else [one for one in inspect.signature(owner).parameters if one not in ("args", "kwargs")]
