"""Download a checked file from the Hugging Face Hub, and upload several files in one commit.

Everything goes through ``huggingface_hub``: its cache, its token, HF_HUB_OFFLINE, HF_ENDPOINT. Only safetensors and JSON are
read: nothing from the Hub is executed or unpickled. This module imports ``huggingface_hub``: import it only to use the Hub.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from lightning_deepr._version import __version__
from lightning_deepr.hub.errors import HubError, readable
from lightning_deepr.hub.library import CommitOperationAdd, HfApi, hf_hub_download

WEIGHTS = "model.safetensors"
LIBRARY = "lightning-deepr"


@dataclass(frozen=True)
class Published:
    """The result of :func:`upload`.

    Attributes:
        url: the address of the commit or of the pull request.
        revision: the hash of the commit, to pin it: ``zoo.load(repo_id, source="hub", revision=...)``.
        sha256: the sha256 of the weights' file.
        repo_id: ``owner/name``.
    """

    url: str
    revision: str
    sha256: str
    repo_id: str


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    filename: str = WEIGHTS,
    sha256: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Get a file of a model repository, from the cache if it is there, and check it.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, a tag or a whole commit hash; None: the newest commit of the main branch. With a commit hash, a file
            in the cache needs no request.
        filename: the name of the file in the repository.
        sha256: the sha256 that the file must have, 64 hex digits; None: the checksum that the Hub stated at the download.
        token: a token; None: the token of ``hf auth login`` or HF_TOKEN; False: no token.
        cache_dir: the folder of the cache; None: the library's.
        local_files_only: True to use the cache alone, as HF_HUB_OFFLINE=1 does.
        force_download: True to download a file that is in the cache again.

    Returns:
        the path in the cache. Don't write to it.

    Raises:
        HubError: the download failed, or a checksum differs; ``reason`` is the cause, and the message says what to do. A file
            that fails the Hub's checksum is removed from the cache.

    Example::

        >>> path = download("someone/lenet300_100.deepr_1pct_mnist", revision="v1")  # doctest: +SKIP
        >>> revision_of(path)  # doctest: +SKIP
        '5503434ddd753f426f4b38109466949a1217c2bb'
    """
    with readable(repo_id, revision=revision, filename=filename):
        path = Path(
            hf_hub_download(
                repo_id,
                filename,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
                library_name=LIBRARY,
                library_version=__version__,
            )
        )
    _check(path, f"`{filename}` of `{repo_id}`", sha256)
    return path


def revision_of(path: str | PathLike[str]) -> str:
    """Read the commit of a downloaded file from its path: ``.../snapshots/<commit>/model.safetensors``."""
    return Path(path).parent.name


def _check(path: Path, what: str, wanted: str | None) -> None:
    """Compare the checksum of a file in the cache with its name there, which is the Hub's, and with the caller's."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    # Follow one link only: behind it may be a store that several caches share, with other names.
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    name = blob.name if blob is not None else ""
    told = {64: found, 40: hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}.get(len(name))
    if blob is not None and told is not None and told != name:
        try:
            path.unlink()
            blob.unlink(missing_ok=True)
            advice = f"It was removed from the cache ({path}); load again."
        except OSError as error:
            advice = f"It could not be removed from the cache ({error}): remove {path} and {blob}, then load again."
        raise HubError(
            "checksum",
            f"{what}: expected checksum {name}, as the Hub stated, found {told}: the file is damaged. {advice} If this happens "
            "again, something between you and the Hub (a mirror, a proxy) alters files.",
        )
    if wanted is not None and wanted.lower() != found:
        raise HubError(
            "checksum",
            f"{what}: expected sha256 {wanted}, found {found}: this is not the file that you mean. Give the `revision` that "
            "the checksum belongs to.",
        )


def upload(
    files: Mapping[str, Path],
    repo_id: str,
    *,
    title: str,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    parent_commit: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    weights: str = WEIGHTS,
) -> Published:
    """Create the model repository or update it, in one commit. A file that did not change is not sent again.

    Args:
        files: {name in the repository: path}.
        title: the name of the model, for the commit's message.
        repo_id, private, revision, commit_message, parent_commit, create_pr, token: see :func:`lightning_deepr.zoo.publish`.
        weights: the name in the repository of the file whose sha256 is returned.

    Raises:
        HubError: the upload failed; ``reason`` is the cause, and the message says what to do.
    """
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with readable(repo_id, revision=revision, publishing=True):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()],
            commit_message=commit_message or f"{title} by {LIBRARY} {__version__}",
            revision=revision,
            parent_commit=parent_commit,
            create_pr=create_pr,
        )
    url = commit.pr_url if create_pr and commit.pr_url else commit.commit_url
    return Published(url, commit.oid, hashlib.sha256(files[weights].read_bytes()).hexdigest(), repo_id)
