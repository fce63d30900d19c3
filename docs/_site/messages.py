"""The messages of the package, read from its sources: what it raises, warns and says.

    python docs/_site/messages.py            lists the messages that docs/troubleshooting.md lacks, and those that are gone
    python docs/_site/messages.py --write    removes those that are gone and adds the others under "Without a family"

``docs/troubleshooting.md`` has every message in a block of text beside what to do, and ``tests/docs/test_troubleshooting.py``
compares. A value that is known only when the message is made is written as an ellipsis.
"""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_deepr"
PAGE = ROOT / "docs" / "troubleshooting.md"
UNKNOWN = "## Without a family"
# Files whose functions return source code or pages: texts, but none that says something to a user of the package.
CODE = re.compile(r"export/c_(arithmetic|layers|source|state|header)\.py|commands/(page|drawings)\.py|hub/cards\.py")
PATTERN = re.compile(r"\(\?[:!]|\w\|\w")  # a regular expression
# Calls that show their arguments to a user. A `refuse` of the command line ends it with a message.
SHOWS = re.compile(r"(^|\.)(warn|rank_zero_warn|rank_zero_info|warning|refuse|error)$")


@cache
def sources() -> dict[str, ast.Module]:
    """Parse every file of the package: {path below the package: tree}."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in files}


def text_of(node: ast.expr | None) -> str | None:
    """Write a string expression with an ellipsis in the place of each value; None: it is no literal text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        text = text_of(node.left)
        return None if text is None else re.sub(r"%[\w.]", "…", text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        text = text_of(node.func.value)
        return None if text is None else re.sub(r"\{[^{}]*\}", "…", text)
    return None


def plain(text: str) -> str:
    """Put a message on one line, and write neighbouring values as one."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"…(\s?…)+", "…", text)


def is_message(text: str) -> bool:
    """Whether a text says something: three words or more, with spaces between them."""
    return (
        len(re.findall(r"(?<![\w.<@])[A-Za-z][A-Za-z'-]+(?![\w(@=>])", text)) >= 3
        and text.count(" ") >= 2
        and not PATTERN.search(text)
    )


def literals(node: ast.expr) -> Iterator[str]:
    """Find the texts that an expression may be: both sides of a condition, and of ``or``."""
    text = text_of(node)
    if text is not None:
        yield text
    elif isinstance(node, ast.IfExp):
        yield from literals(node.body)
        yield from literals(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from literals(value)
    elif isinstance(node, ast.Call):
        for argument in node.args:
            yield from literals(argument)
    elif isinstance(node, ast.List | ast.Tuple):
        for element in node.elts:
            yield from literals(element)
    elif isinstance(node, ast.ListComp | ast.GeneratorExp):
        yield from literals(node.elt)


def used(node: ast.AST) -> set[str]:
    """Collect the names whose text an expression may show: variables, constants, and functions that it calls."""
    names = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return names | {
        one.func.attr for one in ast.walk(node) if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)
    }


def _shown(node: ast.AST) -> list[ast.expr]:
    """Give the arguments that a statement or a call shows to a user."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return [*node.exc.args, *(word.value for word in node.exc.keywords)]
    if isinstance(node, ast.Call) and SHOWS.search(ast.unparse(node.func)):
        return [*node.args]
    return []


def _given(function: ast.AST, shown: set[str]) -> Iterator[ast.expr]:
    """Find what variables with these names are given in a function: by assignment, in a loop, or by ``append``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in shown for target in targets):
                yield node.value
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name) and node.target.id in shown:
            yield node.iter
        elif isinstance(node, ast.NamedExpr) and node.target.id in shown:
            yield node.value
        elif isinstance(node, ast.Call) and _grows(node.func, shown):
            yield from node.args


def _grows(function: ast.expr, shown: set[str]) -> bool:
    """Whether a call is ``append`` or ``extend`` of one of these variables."""
    if not isinstance(function, ast.Attribute) or function.attr not in ("append", "extend"):
        return False
    return isinstance(function.value, ast.Name) and function.value.id in shown


@cache
def _functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _returned(function: ast.FunctionDef) -> list[ast.expr]:
    found = [node.value for node in ast.walk(function) if isinstance(node, ast.Return | ast.Yield | ast.YieldFrom)]
    return [value for value in found if value is not None]


def of_function(function: ast.AST, expressions: list[ast.expr]) -> tuple[set[str], set[str]]:
    """Find the texts that these expressions of a function show, and the names (constants, functions) that they use."""
    texts: set[str] = set()
    names: set[str] = set()
    pending, seen = list(expressions), set()
    while pending:
        expression = pending.pop()
        if id(expression) in seen:
            continue
        seen.add(id(expression))
        texts.update(literals(expression))
        new = used(expression) - names
        names |= new
        pending += _given(function, new)
    return texts, names


@cache
def found() -> dict[str, set[str]]:
    """Collect the messages of the package: {message: the files that have it}.

    A message is a literal text that a ``raise`` or a warning shows, directly, by a variable of the same function, by a constant
    of a module, or by a function of the package that returns it.
    """
    trees = sources()
    all_of_them: dict[str, set[str]] = {}
    asked: set[str] = set()

    def keep(texts: set[str], name: str) -> None:
        for text in map(plain, texts):
            if is_message(text):
                all_of_them.setdefault(text, set()).add(name)

    for name, tree in trees.items():
        for function in _functions(tree):
            texts, names = of_function(function, [one for node in ast.walk(function) for one in _shown(node)])
            keep(texts, name)
            asked |= names
    done: set[str] = set()
    while new := asked - done:  # constants and functions, and what these use in turn
        done |= new
        for name, tree in trees.items():
            for node in tree.body:
                if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id in new for one in node.targets):
                    keep(set(literals(node.value)), name)
            for function in _functions(tree):
                if function.name in new and not CODE.match(name) and _returns_text(function):
                    texts, names = of_function(function, _returned(function))
                    keep(texts, name)
                    asked |= names
    return all_of_them


def _returns_text(function: ast.FunctionDef) -> bool:
    """Whether a function says that it returns a text, or texts."""
    return function.returns is not None and re.search(r"\bstr\b", ast.unparse(function.returns)) is not None


def error_classes() -> list[str]:
    """List the classes of errors and warnings that the package defines, without private ones."""
    errors = re.compile(r"(Error|Exception|Warning|SystemExit)$")
    return sorted(
        node.name
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(errors.search(ast.unparse(base)) for base in node.bases)
        and not node.name.startswith("_")
    )


def listed(page: str) -> dict[str, list[str]]:
    """Read the page: {title of a family: its messages}."""
    families: dict[str, list[str]] = {}
    for section in re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"^```text\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
        families[section.splitlines()[0]] = [line for block in blocks for line in block.splitlines() if line]
    return families


def written(page: str) -> str:
    """Bring the page up to date: without the messages that are gone, and with the others under ``UNKNOWN``."""
    now = found()
    there = {line for lines in listed(page).values() for line in lines}
    for line in there - now.keys():
        page = page.replace(f"\n{line}\n", "\n")
    if missing := sorted(now.keys() - there):
        page += f"\n{UNKNOWN}\n\n```text\n" + "\n".join(missing) + "\n```\n"
    return page


def main(arguments: list[str]) -> int:
    page, now = PAGE.read_text(encoding="utf-8"), found()
    families = {line: title for title, lines in listed(page).items() for line in lines}
    for line in sorted(now.keys() - families.keys()):
        near = difflib.get_close_matches(line, families, n=1, cutoff=0.4)
        print(f"missing ({', '.join(sorted(now[line]))}): {line}\n    perhaps in: {families[near[0]] if near else '?'}")
    for line in sorted(families.keys() - now.keys()):
        print(f"gone: {line}")
    if "--write" in arguments:
        PAGE.write_text(written(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
