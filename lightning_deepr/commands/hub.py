"""``lightning-deepr zoo publish`` and ``lightning-deepr zoo pull``."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning_deepr import zoo


def publish(arguments: Sequence[str]) -> None:
    """``zoo publish NAME_OR_PATH OWNER/NAME``: put a model on the Hugging Face Hub."""
    parser = argparse.ArgumentParser(
        prog="lightning-deepr zoo publish",
        description="Put a model on the Hugging Face Hub: weights, card, picture, recipe. Log in with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("model", help="a name of the zoo or a file that zoo.save wrote")
    parser.add_argument("repository", help="owner/name; made where there is none")
    parser.add_argument(
        "--private", action="store_true", default=None, help="if the repository is new (default: as the owner's settings say)"
    )
    parser.add_argument("--revision", help="the branch to write to (default: main)")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--recipe", help="YAML to put beside it (default: the recipe that the file names)")
    parser.add_argument("--keep-card", action="store_true", help="leave the repository's README.md alone")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request")
    given = parser.parse_args(arguments)
    try:
        made = zoo.publish(
            given.model,
            given.repository,
            private=given.private,
            revision=given.revision,
            commit_message=given.message,
            recipe=given.recipe,
            card=not given.keep_card,
            create_pr=given.pull_request,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-deepr zoo publish: {error}") from error
    print(f"{made.url}\nrevision {made.revision}\nsha256   {made.sha256}")


def pull(arguments: Sequence[str]) -> None:
    """``zoo pull OWNER/NAME``: get a model's file from the Hugging Face Hub, and check it."""
    parser = argparse.ArgumentParser(
        prog="lightning-deepr zoo pull",
        description="Get a model's file from the Hugging Face Hub, checked. Prints the revision to pin.",
    )
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--revision", help="a branch, a tag or a commit hash (default: the newest)")
    parser.add_argument("--sha256", help="that the file must have")
    parser.add_argument("--output", type=Path, help="copy it there (default: it stays in the cache)")
    given = parser.parse_args(arguments)
    from lightning_deepr.hub import transfer

    try:
        path = transfer.download(given.repository, revision=given.revision, sha256=given.sha256)
        zoo.connections_of(path)  # all of it is read, and checked
        if given.output is not None:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, given.output)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-deepr zoo pull: {error}") from error
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{given.output or path}\nrevision {transfer.revision_of(path)}\nsha256   {sha256}")
