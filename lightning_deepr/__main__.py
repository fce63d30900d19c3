"""The command line as ``python -m lightning_deepr``, for a Python whose programs are not on the path."""

from lightning_deepr.commands.main import main

if __name__ == "__main__":
    main()
