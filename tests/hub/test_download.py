"""Downloads by the real client from a server on loopback that speaks the Hub's API: cached, pinned, checked, tried again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from lightning_deepr import zoo  # noqa: E402
from lightning_deepr.hub import HubError, download, publish, revision_of  # noqa: E402
from tests.helpers.hub import MODEL, lenet, same  # noqa: E402
from tests.helpers.hub_server import HubServer, Repository, Stored  # noqa: E402

WEIGHTS = b"not quite a model" * 5000


# the client warns about a library that it uses
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
tries_again = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2,
    reason="huggingface_hub 1 gives up sooner, and does not resume what was cut",
)


@pytest.fixture
def stored(hub: HubServer) -> Repository:
    """Make another user's repository with a large file and a regular one."""
    repository = Repository()
    hub.repositories["someone/net"] = repository
    hub.large[hashlib.sha256(WEIGHTS).hexdigest()] = WEIGHTS
    repository.commit({"model.safetensors": Stored(WEIGHTS, True), "config.json": Stored(b"{}", False)})
    return repository


FILES = r"/resolve/|/[0-9a-f]{64}"


def methods(hub: HubServer) -> list[str]:
    """List the methods of the requests for files; the client makes other requests, too."""
    return [request.method for request in hub.asked(FILES)]


def test_a_download_is_cached_and_pinned(hub: HubServer, stored: Repository) -> None:
    path = download("someone/net")
    assert path.read_bytes() == WEIGHTS
    assert revision_of(path) == stored.refs["main"]
    assert methods(hub) == ["HEAD", "GET"]
    assert download("someone/net") == path  # the newest revision: one request, no download
    assert methods(hub) == ["HEAD", "GET", "HEAD"]
    download("someone/net", revision=revision_of(path))  # a pinned revision: no request
    assert methods(hub) == ["HEAD", "GET", "HEAD"]
    download("someone/net", force_download=True)
    assert methods(hub) == ["HEAD", "GET", "HEAD", "HEAD", "GET"]


def test_a_tag_and_an_old_revision_give_the_old_file(hub: HubServer, stored: Repository) -> None:
    old = stored.refs["v1"] = stored.refs["main"]
    stored.commit({"model.safetensors": Stored(b"new", False)})
    assert download("someone/net").read_bytes() == b"new"
    assert download("someone/net", revision="v1").read_bytes() == WEIGHTS
    assert download("someone/net", revision=old).read_bytes() == WEIGHTS


def test_no_token_leaves_the_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch, stored: Repository) -> None:
    stored.private = True
    hub.tokens["hf_someone"] = "someone"
    monkeypatch.setenv("HF_TOKEN", "hf_someone")
    assert download("someone/net").read_bytes() == WEIGHTS
    large = [request for request in hub.requests if request.server == "store"]
    assert large and all("authorization" not in {name.lower() for name in request.headers} for request in large)


@tries_again
def test_a_cut_connection_goes_on_where_it_was(
    hub: HubServer, stored: Repository, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # the client keeps whole chunks of a cut body
    hub.cut(r"GET /[0-9a-f]{64}", after=20_000)
    assert download("someone/net").read_bytes() == WEIGHTS
    ranges = [request.headers.get("Range") for request in hub.asked(r"GET /[0-9a-f]{64}")]
    assert ranges[0] is None and len(ranges) == 2
    assert 0 < int(ranges[1].removeprefix("bytes=").rstrip("-")) <= 20_000
    assert waits == [1]


def test_a_connection_that_stays_cut(hub: HubServer, stored: Repository, tmp_path: Path) -> None:
    hub.cut(r"GET /[0-9a-f]{64}", after=0, times=100)
    with pytest.raises(
        HubError, match=r"all of `model.safetensors` of `someone/net`, found that the connection was cut"
    ) as caught:
        download("someone/net")
    assert caught.value.reason == "cut"
    left = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size > 1000]
    assert left == []  # no partial file is kept
    hub.faults.clear()
    assert download("someone/net").read_bytes() == WEIGHTS


@tries_again
def test_the_client_tries_again(
    hub: HubServer, stored: Repository, file: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail("HEAD", 429, times=2, Retry_After="7")
    assert download("someone/net").read_bytes() == WEIGHTS
    assert 8 in waits  # Retry-After and one second more
    hub.fail("HEAD", 500, times=1)
    assert download("someone/net", filename="config.json").read_bytes() == b"{}"
    hub.fail("PUT /", 500, times=2)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert same(zoo.load(publish(file, MODEL, picture=False).repo_id, source="hub"), lenet())
    assert len(hub.asked("PUT /")) == 3


def test_rate_limit(hub: HubServer, stored: Repository) -> None:
    hub.fail("HEAD", 429, Retry_After="40")
    with pytest.raises(HubError, match=r"rate limit is reached \(HTTP 429\).*Try again in 40 seconds") as caught:
        download("someone/net")
    assert (caught.value.reason, caught.value.status) == ("rate_limit", 429)


def test_server_error(hub: HubServer, stored: Repository) -> None:
    download("someone/net")
    hub.fail("HEAD", 500)
    with pytest.raises(HubError, match=r"an error of the Hub itself \(HTTP 500\)") as caught:
        download("someone/net", filename="config.json")
    assert (caught.value.reason, caught.value.status) == ("server", 500)
    assert isinstance(caught.value.__cause__, Exception)
    assert download("someone/net").read_bytes() == WEIGHTS  # a file in the cache loads without the Hub


def test_nothing_there(hub: HubServer, stored: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("", "hf_reader"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            HubError, match=r"expected the model repository `someone/other`.*found none.*private.*hf auth login"
        ) as caught:
            download("someone/other")
        assert caught.value.reason == "not_found"
    assert caught.value.status == 404
    with pytest.raises(HubError, match="expected revision `v9` in `someone/net`, found no branch, tag or commit") as caught:
        download("someone/net", revision="v9")
    assert caught.value.reason == "revision"
    stored.commit({"pytorch_model.bin": Stored(b"\x80\x04.", True)})
    with pytest.raises(
        HubError, match=r"expected the file `model.safetensors` in `someone/net`, found a repository without it"
    ) as caught:
        download("someone/net")
    assert caught.value.reason == "no_file"
    assert hub.asked(f"GET.*({FILES})") == []  # also not the pickle
    with pytest.raises(HubError, match="expected a repository as `owner/name`, found 'a/b/c'"):
        download("a/b/c")


def test_no_access(hub: HubServer, stored: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.private = True
    for token, status in (("", 401), ("hf_reader", 404)):  # the Hub hides private repositories from strangers
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match="For a private repository") as caught:
            download("someone/net")
        assert (caught.value.reason, caught.value.status) == ("not_found", status)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match=r"expected a token that the Hub accepts.*HTTP 401.*hf auth login") as caught:
        download("someone/net")
    assert (caught.value.reason, caught.value.status) == ("no_access", 401)
    stored.private, stored.gated = False, True
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubError, match="gated repository") as caught:
        download("someone/net")
    assert caught.value.reason == "no_access"
    stored.gated = False
    hub.fail("HEAD", 403)
    with pytest.raises(HubError, match=r"token with the right to read `someone/net`.*HTTP 403") as caught:
        download("someone/net")
    assert (caught.value.reason, caught.value.status) == ("no_access", 403)


def test_offline(hub: HubServer, stored: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download("someone/net")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert download("someone/net") == path
    with pytest.raises(
        HubError, match=r"`config.json` of `someone/net` in the cache .* since HF_HUB_OFFLINE=1 is set"
    ) as caught:
        download("someone/net", filename="config.json")
    assert caught.value.reason == "offline"
    assert len(hub.requests) == asked  # not even the client's own requests
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert download("someone/net", local_files_only=True) == path
    with pytest.raises(HubError, match="since local_files_only=True was given"):
        download("someone/net", filename="config.json", local_files_only=True)


def test_no_network(hub: HubServer, stored: Repository) -> None:
    path = download("someone/net")
    hub.close()
    huggingface_hub.utils.close_session()
    assert download("someone/net") == path
    with pytest.raises(
        HubError, match=r"expected to reach http://127.0.0.1:\d+ .*found no connection, and no copy of it in the cache"
    ) as caught:
        download("someone/net", filename="config.json")
    assert caught.value.reason == "network"


def test_an_endpoint_that_is_no_hub(hub: HubServer, stored: Repository) -> None:
    hub.fail("HEAD", 200)
    with pytest.raises(HubError, match="to answer as the Hub does") as caught:
        download("someone/net")
    assert caught.value.reason == "network"


def test_checksum(hub: HubServer, stored: Repository) -> None:
    name = hashlib.sha256(WEIGHTS).hexdigest()
    hub.large[name] = WEIGHTS[:-1] + b"?"  # the right size, another content
    with pytest.raises(
        HubError, match=f"expected checksum {name}.*the file is damaged. It was removed from the cache"
    ) as caught:
        download("someone/net")
    assert caught.value.reason == "checksum"
    hub.large[name] = WEIGHTS
    path = download("someone/net")
    assert path.read_bytes() == WEIGHTS
    blob = path.resolve()
    blob.chmod(0o644)
    blob.write_bytes(WEIGHTS[:-1] + b"?")  # as a bad disk would change it
    with pytest.raises(HubError, match="removed from the cache"):
        download("someone/net")
    assert download("someone/net", sha256=name.upper()).read_bytes() == WEIGHTS
    with pytest.raises(HubError, match=f"expected sha256 {'0' * 64}, found {name}"):
        download("someone/net", sha256="0" * 64)
    assert path.exists()  # the caller gave a wrong checksum; the file is right
    regular = download("someone/net", filename="config.json")
    regular.resolve().write_bytes(b"[]")
    with pytest.raises(HubError, match="removed from the cache"):
        download("someone/net", filename="config.json")
