"""The commands ``lightning-deepr zoo publish`` and ``lightning-deepr zoo pull``."""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from lightning_deepr import zoo


def publish(arguments: Sequence[str]) -> None:
    """Run ``zoo publish NAME_OR_PATH OWNER/NAME``: publish a model on the Hugging Face Hub.

    Raises:
        SystemExit: something is wrong. The message says what.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-deepr zoo publish",
        description="Publish a model on the Hugging Face Hub: weights, card, picture, recipe. "
        "Log in with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("model", help="a name of the zoo or a file that zoo.save wrote")
    parser.add_argument("repository", help="owner/name; created if it does not exist")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make a new repository private (default: the owner's settings)"
    )
    parser.add_argument("--revision", help="the branch to write to (default: main)")
    parser.add_argument("--message", help="message of the commit (default: a line with the model's name)")
    parser.add_argument("--recipe", help="YAML to publish with the model (default: the recipe that the file names)")
    parser.add_argument("--keep-card", action="store_true", help="keep the repository's README.md")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request instead")
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
    """Run ``zoo pull OWNER/NAME``: download a model's file from the Hugging Face Hub, and check it.

    Raises:
        SystemExit: something is wrong. The message says what.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-deepr zoo pull",
        description="Download a model's file from the Hugging Face Hub, check it, and print the revision to pin.",
    )
    parser.add_argument("repository", help="owner/name")
    parser.add_argument("--revision", help="a branch, a tag or a commit hash (default: the newest)")
    parser.add_argument("--sha256", help="checksum that the file must have")
    parser.add_argument("--output", type=Path, help="path for a copy of the file (default: the file stays in the cache)")
    given = parser.parse_args(arguments)
    from lightning_deepr.hub import transfer

    try:
        path = transfer.download(given.repository, revision=given.revision, sha256=given.sha256)
        zoo.connections_of(path)  # reads and checks the whole file
        if given.output is not None:
            given.output.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, given.output)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-deepr zoo pull: {error}") from error
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{given.output or path}\nrevision {transfer.revision_of(path)}\nsha256   {sha256}")
