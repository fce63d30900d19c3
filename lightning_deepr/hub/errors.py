"""Errors of the Hugging Face Hub, with messages that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_deepr.hub.library import constants, errors

# The base class of the errors of the library's HTTP client (httpx or httpx2, depending on the library's version).
_HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__mro__[1]
_CUT = ("RemoteProtocolError", "ReadError", "ReadTimeout", "WriteError", "WriteTimeout", "CloseError", "XetDownloadError")
_RAISED = (
    _HTTP_ERROR,
    errors.HfHubHTTPError,
    errors.EntryNotFoundError,
    errors.OfflineModeIsEnabled,
    errors.LocalTokenNotFoundError,
    errors.FileMetadataError,
    errors.XetDownloadError,
    errors.HFValidationError,
    OSError,
    RuntimeError,
    ValueError,
)
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"


class HubError(OSError):
    """A failed download from the Hub, or a failed upload to it.

    The library's own error is the ``__cause__``.

    Attributes:
        reason: "not_found", "no_access", "revision", "no_file", "rate_limit", "server", "network", "offline", "cut",
            "checksum", "conflict" or "refused".
        status: the status of the HTTP answer; None: there was no answer.
    """

    def __init__(self, reason: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.reason, self.status = reason, status


@contextmanager
def readable(
    repo_id: str, *, revision: str | None = None, filename: str | None = None, publishing: bool = False
) -> Iterator[None]:
    """Turn the library's errors into :class:`HubError`. Errors that the Hub did not cause (a full disk) pass unchanged.

    Args:
        repo_id: ``owner/name``.
        revision: the requested revision; None: the main branch.
        filename: the requested file.
        publishing: True while the user writes to the Hub: a refusal has other causes then.
    """
    try:
        yield
    except HubError:
        raise
    except _RAISED as error:
        told = _explain(list(_chain(error)), repo_id, revision, filename, publishing)
        if told is None:
            raise
        raise told from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(
    chain: list[BaseException], repo_id: str, revision: str | None, filename: str | None, publishing: bool
) -> HubError | None:
    at = f"`{repo_id}`" + (f" at revision `{revision}`" if revision else "")
    what = f"`{filename}` of {at}" if filename else at
    for error in chain:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.HFValidationError):
            return HubError("refused", f"expected a repository as `owner/name`, found {repo_id!r}: {error}")
        if isinstance(error, errors.GatedRepoError):
            return HubError(
                "no_access",
                f"expected access to {at}, found a gated repository (HTTP {status}). Ask for access on "
                f"{constants.ENDPOINT}/{repo_id}. {_LOG_IN} of an account that has it.",
                status,
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return HubError(
                "revision",
                f"expected revision `{revision or 'main'}` in `{repo_id}`, found no branch, tag or commit of that name (HTTP "
                f"{status}). Give one that the repository has (a whole commit hash, not its beginning), or leave `revision` "
                "out for the newest.",
                status,
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return HubError(
                "not_found",
                f"expected the model repository `{repo_id}` on {constants.ENDPOINT}, found none that you may see (HTTP "
                f"{status}). Check the spelling. For a private repository, {_LOG_IN[0].lower() + _LOG_IN[1:]} of an account "
                "that may read it: to everybody else the Hub says that it does not exist.",
                status,
            )
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return HubError(
                "no_file",
                f"expected the file `{filename}` in {at}, found a repository without it (HTTP {status}). Is this a model of "
                "lightning-deepr? `zoo.publish` and `push_to_hub` of a `SparseHubMixin` write that file; pickled weights "
                "(`.bin`, `.pt`) are never read.",
                status,
            )
        if status is not None:
            return _by_status(status, error, repo_id, at, what, publishing)
        if isinstance(error, errors.LocalTokenNotFoundError):
            return HubError("no_access", f"expected a token for {at}, found none. {_LOG_IN}.")
    return _without_answer(chain, at, what, publishing)


def _by_status(status: int, error: BaseException, repo_id: str, at: str, what: str, publishing: bool) -> HubError:
    said = f" The Hub says: {message}" if (message := getattr(error, "server_message", None)) else ""
    if status == 401:
        return HubError(
            "no_access",
            f"expected a token that the Hub accepts for {at}, found none or an expired one (HTTP 401). {_LOG_IN} again.",
            status,
        )
    if status == 403:
        need = "to write to" if publishing else "to read"
        return HubError(
            "no_access",
            f"expected a token with the right {need} {at}, found one without it (HTTP 403). "
            + ("Take a token of type `write`, and an owner to whom you belong." if publishing else "Ask the owner for access.")
            + said,
            status,
        )
    if status == 404:
        return HubError(
            "not_found", f"expected {at} on {constants.ENDPOINT}, found nothing (HTTP 404). Check the spelling.{said}", status
        )
    if status in (409, 412):
        return HubError(
            "conflict",
            f"expected nobody else to write to {at} meanwhile, found another commit (HTTP {status}). Look at it, then publish "
            f"again.{said}",
            status,
        )
    if status == 429:
        wait = getattr(error, "response").headers.get("Retry-After")  # noqa: B009 (the library's error, not known to mypy)
        when = f"in {wait} seconds" if wait and wait.isdigit() else "in some minutes"
        return HubError(
            "rate_limit",
            f"expected an answer about {what}, found that the Hub's rate limit is reached (HTTP 429), also after waiting. Try "
            f"again {when}; with a token, the limit is higher.",
            status,
        )
    if status >= 500:
        return HubError(
            "server",
            f"expected an answer about {what}, found an error of the Hub itself (HTTP {status}), also after trying again. It "
            f"is not yours: wait (status.huggingface.co).{said}",
            status,
        )
    return HubError(
        "refused", f"expected the Hub to accept the request about {what}, found HTTP {status}.{said or f' {error}'}", status
    )


def _without_answer(chain: list[BaseException], at: str, what: str, publishing: bool) -> HubError | None:
    """Explain a chain of errors without an HTTP answer; None: the Hub and the network did not cause it."""
    kinds = {type(error).__name__ for error in chain}
    offline = constants.HF_HUB_OFFLINE
    if any(isinstance(error, errors.OfflineModeIsEnabled) for error in chain) or (
        kinds & {"LocalEntryNotFoundError"} and offline
    ):
        if publishing:
            return HubError(
                "offline", f"expected to reach the Hub for {at}, found that HF_HUB_OFFLINE=1 is set: `unset HF_HUB_OFFLINE`."
            )
        switch = "HF_HUB_OFFLINE=1 is set" if offline else "local_files_only=True was given"
        return HubError(
            "offline",
            f"expected {what} in the cache ({constants.HF_HUB_CACHE}), since {switch}; found it missing. Download it once with "
            f"a network (`unset HF_HUB_OFFLINE`), or load a file by its path.",
        )
    if any("Consistency check failed" in str(error) for error in chain if isinstance(error, OSError)) or kinds & set(_CUT):
        if publishing:
            return HubError(
                "cut",
                f"expected to send everything to {at}, found that the connection was cut in the middle, also after trying "
                "again. Nothing was committed, unless it was cut while the Hub answered: publish again, what arrived is not "
                "sent twice.",
            )
        return HubError(
            "cut",
            f"expected all of {what}, found that the connection was cut in the middle, also after trying again. No partial "
            "file was kept: try again.",
        )
    if kinds & {"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"}:
        return HubError(
            "network",
            f"expected to reach {constants.ENDPOINT} for {what}, found no "
            f"connection{'' if publishing else ', and no copy of it in the cache'}. Check the network, the proxy and "
            f"HF_ENDPOINT{'' if publishing else ', or load a file by its path'}.",
        )
    if kinds & {"LocalEntryNotFoundError", "FileMetadataError"}:
        first = next(error for error in chain if type(error).__name__ in ("LocalEntryNotFoundError", "FileMetadataError"))
        if "local_files_only" in str(first) or "outgoing traffic" in str(first):
            return HubError(
                "offline",
                f"expected {what} in the cache, since local_files_only=True was given; found it missing. Download it once "
                "without this option.",
            )
        return HubError(
            "network", f"expected {constants.ENDPOINT} to answer as the Hub does about {what}, found another answer: {first}"
        )
    if any(isinstance(error, _HTTP_ERROR) for error in chain):
        return HubError("network", f"expected an answer of {constants.ENDPOINT} about {what}, found: {chain[0]}")
    return None
