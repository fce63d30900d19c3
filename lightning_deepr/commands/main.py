"""The command line ``lightning-deepr``: ``fit``, ``validate``, ``test``, ``report``, ``zoo``, ``export`` and ``recipes``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_deepr.recipes.running import TRAINING, packaged_recipes, train


def report(arguments: Sequence[str]) -> None:
    """Run ``lightning-deepr report CHECKPOINT``: print the connectivity of a sparse checkpoint, without its model.

    Raises:
        SystemExit: the checkpoint can't be read or is not sparse.
    """
    parser = argparse.ArgumentParser(prog="lightning-deepr report", description="The connectivity of a sparse checkpoint.")
    parser.add_argument("checkpoint", help="a .ckpt, .pt, .pth or .safetensors file")
    from lightning_deepr.files.checkpoint import report_of_checkpoint

    try:
        print(report_of_checkpoint(parser.parse_args(arguments).checkpoint))
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-deepr report: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command ``lightning-deepr``.

    Args:
        arguments: arguments of the command line; None: those of ``sys.argv``.

    Raises:
        SystemExit: the command is unknown or fails. The message says why.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in TRAINING:
        train(arguments)
    elif arguments and arguments[0] == "report":
        report(arguments[1:])
    elif arguments and arguments[0] == "export":
        from lightning_deepr.commands.export import export

        export(arguments[1:])
    elif arguments and arguments[0] == "zoo":
        from lightning_deepr.commands.zoo import run

        run(arguments[1:])
    elif arguments and arguments[0] == "recipes":
        for name, path in packaged_recipes().items():
            print(f"{name:24s} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('#').strip()}")
    else:
        print(
            "usage: lightning-deepr fit|validate|test --config NAME|PATH [--model.lr 0.1 --sparsity.connectivity 0.05 ...]\n"
            "       lightning-deepr report CHECKPOINT\n"
            "       lightning-deepr zoo list|info|verify|publish|pull ...\n"
            "       lightning-deepr export CHECKPOINT --to dense|csr|onnx|c --out PATH [--module CLASS]\n"
            "       lightning-deepr recipes\n\n"
            f"recipes: {', '.join(packaged_recipes())}"
        )
        if arguments and arguments[0] not in ("-h", "--help"):
            raise SystemExit(
                f"lightning-deepr: expected fit, validate, test, report, zoo, export or recipes, found {arguments[0]!r}."
            )


if __name__ == "__main__":
    main()
