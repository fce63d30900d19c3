"""The models that travel with the package: one entry each."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Entry:
    """A checkpoint of the zoo. Everything else that is known of it is in its file.

    Attributes:
        name: ``architecture.tag``; the file is ``zoo/<name>.safetensors``.
        sha256: of the file, 64 hex digits.
    """

    name: str
    sha256: str

    @property
    def architecture(self) -> str:
        return self.name.partition(".")[0]

    @property
    def filename(self) -> str:
        return f"{self.name}.safetensors"


ENTRIES: tuple[Entry, ...] = ()


def list_models(pattern: str = "*") -> list[str]:
    """The names of the zoo's models, sorted.

    Args:
        pattern: shell wildcards, as in ``"lenet300_100.*"`` or ``"*1pct*"``.

    Example::

        >>> list_models("no_such_architecture.*")
        []
    """
    return sorted(entry.name for entry in ENTRIES if fnmatchcase(entry.name, pattern))


def entry_of(name: str) -> Entry | None:
    return next((entry for entry in ENTRIES if entry.name == name), None)
