"""Sparse models on the Hugging Face Hub: publish one, and get one as a checked file.

Everything goes through ``huggingface_hub``: its cache, its token, HF_HUB_OFFLINE, HF_ENDPOINT. What is read is safetensors and JSON: nothing from
the Hub is executed or unpickled. Import this module only where the Hub is wanted: it imports ``huggingface_hub``.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from torch import nn

from lightning_deepr.hub_errors import HubError, readable

if TYPE_CHECKING:
    from lightning_deepr.hub_mixin import SparseHubMixin

__all__ = ["WEIGHTS", "HubError", "Published", "SparseHubMixin", "download", "load", "publish", "revision_of"]

WEIGHTS = "model.safetensors"
LIBRARY = "lightning-deepr"


def __getattr__(name: str) -> Any:
    if name == "SparseHubMixin":  # its base class signs up every subclass when it is defined: only for those who want one
        from lightning_deepr.hub_mixin import SparseHubMixin

        return SparseHubMixin
    raise AttributeError(f"module 'lightning_deepr.hub' has no attribute {name!r}; it has {', '.join(__all__)}.")


@dataclass(frozen=True)
class Published:
    """What :func:`publish` made.

    Attributes:
        url: of the commit, or of the pull request.
        revision: the commit's hash, to pin: ``zoo.load(repo_id, source="hub", revision=...)``.
        sha256: of the weights' file.
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
    """Get a file of a model repository, from the cache where it is, and check it.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, a tag or a whole commit hash; None: the newest of the main branch. With a commit hash, a file in the cache needs no request.
        filename: within the repository.
        sha256: that the file must have, 64 hex digits; None: the one that the Hub told when the file was downloaded.
        token: None: the one of ``hf auth login`` or HF_TOKEN; False: none.
        cache_dir: None: the library's.
        local_files_only: take it from the cache or not at all, as HF_HUB_OFFLINE=1 does.
        force_download: although it is in the cache.

    Returns:
        the path in the cache. Don't write to it.

    Raises:
        HubError: with ``reason`` and what to do. A file that fails the Hub's checksum is taken out of the cache.

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
                library_version=_version(),
            )
        )
    _check(path, f"`{filename}` of `{repo_id}`", sha256)
    return path


def revision_of(path: str | PathLike[str]) -> str:
    """The commit of a downloaded file: ``.../snapshots/<commit>/model.safetensors``."""
    return Path(path).parent.name


def _version() -> str:
    from lightning_deepr import __version__

    return __version__


def _check(path: Path, what: str, wanted: str | None) -> None:
    """Compare a file in the cache with its name there, which is the Hub's checksum, and with the one that the caller knows."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    # one step only: what lies beyond may be a store that several caches share, under other names
    blob = path.parent / os.readlink(path) if path.is_symlink() else None
    name = blob.name if blob is not None else ""
    told = {64: found, 40: hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}.get(len(name))
    if blob is not None and told is not None and told != name:
        try:
            path.unlink()
            blob.unlink(missing_ok=True)
            advice = f"It was taken out of the cache ({path}); load again."
        except OSError as error:
            advice = f"It could not be taken out of the cache ({error}): remove {path} and {blob}, then load again."
        raise HubError(
            "checksum",
            f"{what}: expected checksum {name}, as the Hub told, found {told}: the file is damaged. {advice} If that comes back, what stands between "
            "you and the Hub (a mirror, a proxy) alters files.",
        )
    if wanted is not None and wanted.lower() != found:
        raise HubError(
            "checksum",
            f"{what}: expected sha256 {wanted}, found {found}: this is another file than the one that you mean. Give the `revision` to which the "
            "checksum belongs.",
        )


def load(
    repo_id: str,
    *,
    revision: str | None = None,
    dense: bool = False,
    module: nn.Module | None = None,
    sha256: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a published model: :func:`download`, then ``zoo.load`` of the file. The same as ``zoo.load(repo_id, source="hub")``.

    Args:
        repo_id, revision, sha256, token, cache_dir, local_files_only: as for :func:`download`.
        dense: ordinary dense weights instead of sparse ones.
        module: the network to load into, for an architecture that the zoo does not know.

    Returns:
        the network in eval mode.

    Raises:
        HubError: see :func:`download`.
        ValueError: the file is no sparse model, is damaged, or of another architecture than ``module``.

    Example::

        >>> net = load("someone/lenet300_100.deepr_1pct_mnist")  # doctest: +SKIP
    """
    from lightning_deepr import zoo

    if repo_id.count("/") != 1:
        raise ValueError(
            f'expected a repository of the Hub as "owner/name", found {repo_id!r}. A model of the package needs source="package".'
        )
    path = download(
        repo_id, revision=revision, sha256=sha256, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    return zoo.load(path, dense=dense, module=module)


def publish(
    model: str | PathLike[str] | nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    parent_commit: str | None = None,
    create_pr: bool = False,
    card: bool | str | PathLike[str] = True,
    picture: bool = True,
    recipe: str | PathLike[str] | None = None,
    token: str | bool | None = None,
    **metadata: Any,
) -> Published:
    """Publish a sparse model: create the repository or update it, in one commit.

    Written are ``model.safetensors``, ``config.json``, ``README.md`` (the model card, with evaluation metadata), ``connectivity.png`` and, when
    known, the recipe's YAML. Other files of the repository stay. A file that is the same already is not sent again.

    Args:
        model: a name of the zoo, a path of a file that ``zoo.save`` wrote, or a module with converted weights.
        repo_id: ``owner/name``; of the user of the token where it is a bare name.
        private: of a new repository; None: as the owner's settings say. An existing one stays as it is.
        revision: the branch to write to, made when it is missing; None: the main branch.
        commit_message: None: a line with the model's name.
        parent_commit: refuse when the branch is not at this commit any more.
        create_pr: open a pull request instead (for a repository that is not yours).
        card: False leaves the repository's README.md alone; a path is a card of your own.
        picture: whether to draw the connectivity (needs matplotlib).
        recipe: YAML to put beside it; None: the packaged recipe that the file's metadata names.
        token: None: the one of ``hf auth login`` or HF_TOKEN.
        metadata: of a module only, as for ``zoo.save``.

    Returns:
        url, revision (commit hash) and sha256.

    Raises:
        HubError: with ``reason`` and what to do.
        ValueError: the file is damaged or no sparse model; nothing is sent then.

    Example::

        >>> publish("lenet300_100.deepr_1pct_mnist", "me/lenet300_100.deepr_1pct_mnist", private=True).revision  # doctest: +SKIP
        '5503434ddd753f426f4b38109466949a1217c2bb'
    """
    from lightning_deepr.hub_files import stage

    with tempfile.TemporaryDirectory() as folder:
        staged = stage(model, Path(folder), repo_id=repo_id, card=card, picture=picture, recipe=recipe, metadata=metadata)
        weights = staged.files[WEIGHTS].read_bytes()
        api = HfApi(token=token, library_name=LIBRARY, library_version=_version())
        with readable(repo_id, revision=revision, publishing=True):
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in staged.files.items()],
                commit_message=commit_message or f"{staged.info['name']} by {LIBRARY} {_version()}",
                revision=revision,
                parent_commit=parent_commit,
                create_pr=create_pr,
            )
    url = commit.pr_url if create_pr and commit.pr_url else commit.commit_url
    return Published(url, commit.oid, hashlib.sha256(weights).hexdigest(), repo_id)
