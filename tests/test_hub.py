"""The Hub, by the real client against a server on loopback (``hub_server.py``) that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import connections, sparsify, zoo
from lightning_deepr.cli import main
from lightning_deepr.hub import HubError, SparseHubMixin, download, publish, revision_of
from lightning_deepr.models import LeNet300100
from lightning_deepr.zoo.container import sign
from tests.hub_server import HubServer, Repository, Stored

WEIGHTS = b"not quite a model" * 5000
MODEL = "writer/lenet300_100.test"
# the client's own affair with the library below it
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
tries_again = pytest.mark.skipif(
    int(huggingface_hub.__version__.split(".")[0]) < 2,
    reason="huggingface_hub 1 gives up sooner, and does not resume what was cut",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server, and the client's settings for it: what HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET set at import."""
    constants = huggingface_hub.constants
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            assert hasattr(constants, name)
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        huggingface_hub.utils.close_session()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have waited before it tried again."""
    slept: list[float] = []
    clock = types.SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("__")})
    clock.sleep = slept.append
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download):
        monkeypatch.setattr(module, "time", clock)
    return slept


@pytest.fixture
def stored(hub: HubServer) -> Repository:
    """A repository with a large file and a regular one, as somebody else published it."""
    repository = Repository()
    hub.repositories["someone/net"] = repository
    hub.large[hashlib.sha256(WEIGHTS).hexdigest()] = WEIGHTS
    repository.commit({"model.safetensors": Stored(WEIGHTS, True), "config.json": Stored(b"{}", False)})
    return repository


FILES = r"/resolve/|/[0-9a-f]{64}"


def methods(hub: HubServer) -> list[str]:
    """What was asked about files (the client has questions of its own, too)."""
    return [request.method for request in hub.asked(FILES)]


# -- download -------------------------------------------------------------------------------------------------------------------


def test_a_download_is_cached_and_pinned(hub: HubServer, stored: Repository) -> None:
    path = download("someone/net")
    assert path.read_bytes() == WEIGHTS
    assert revision_of(path) == stored.refs["main"]
    assert methods(hub) == ["HEAD", "GET"]
    assert download("someone/net") == path  # the newest: one look, no download
    assert methods(hub) == ["HEAD", "GET", "HEAD"]
    download("someone/net", revision=revision_of(path))  # a pinned one: no request at all
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
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is kept of a cut body is whole chunks
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
    assert left == []  # nothing half is kept
    hub.faults.clear()
    assert download("someone/net").read_bytes() == WEIGHTS


@tries_again
def test_the_client_tries_again(
    hub: HubServer, stored: Repository, file: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail("HEAD", 429, times=2, Retry_After="7")
    assert download("someone/net").read_bytes() == WEIGHTS
    assert 8 in waits  # as long as Retry-After says, and one more
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
    assert download("someone/net").read_bytes() == WEIGHTS  # what is in the cache is there without the Hub


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
    assert hub.asked(f"GET.*({FILES})") == []  # least of all the pickle
    with pytest.raises(HubError, match="expected a repository as `owner/name`, found 'a/b/c'"):
        download("a/b/c")


def test_no_access(hub: HubServer, stored: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.private = True
    for token, status in (("", 401), ("hf_reader", 404)):  # the Hub does not tell strangers that there is something
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
    assert len(hub.requests) == asked  # not even the client's own questions
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
    hub.large[name] = WEIGHTS[:-1] + b"?"  # of the right size
    with pytest.raises(
        HubError, match=f"expected checksum {name}.*the file is damaged. It was taken out of the cache"
    ) as caught:
        download("someone/net")
    assert caught.value.reason == "checksum"
    hub.large[name] = WEIGHTS
    path = download("someone/net")
    assert path.read_bytes() == WEIGHTS
    blob = path.resolve()
    blob.chmod(0o644)
    blob.write_bytes(WEIGHTS[:-1] + b"?")  # a bad disk
    with pytest.raises(HubError, match="taken out of the cache"):
        download("someone/net")
    assert download("someone/net", sha256=name.upper()).read_bytes() == WEIGHTS
    with pytest.raises(HubError, match=f"expected sha256 {'0' * 64}, found {name}"):
        download("someone/net", sha256="0" * 64)
    assert path.exists()  # the caller's mistake, not the file's
    regular = download("someone/net", filename="config.json")
    regular.resolve().write_bytes(b"[]")
    with pytest.raises(HubError, match="taken out of the cache"):
        download("someone/net", filename="config.json")


# -- a user's own class ---------------------------------------------------------------------------------------------------------


class Net(nn.Module, SparseHubMixin):
    def __init__(self, width: int = 30, depth: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.body(x))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have equal connections and equal other tensors, bit for bit."""
    ours, theirs = connections(one), connections(other)
    if ours.keys() != theirs.keys():
        return False
    for name, (shape, places, values) in ours.items():
        mine, yours = places.argsort(), theirs[name][1].argsort()  # files are in the order of places
        if shape != theirs[name][0] or not torch.equal(places[mine], theirs[name][1][yours]):
            return False
        if values[mine].numpy().tobytes() != theirs[name][2][yours].numpy().tobytes():
            return False
    dense = [{n: v for n, v in net.state_dict().items() if "parametrizations" not in n} for net in (one, other)]
    return dense[0].keys() == dense[1].keys() and all(torch.equal(dense[0][name], dense[1][name]) for name in dense[0])


def test_a_class_of_the_user_goes_to_a_folder_and_back(tmp_path: Path) -> None:
    net = sparsify(Net(width=40, depth=2), 0.05, seed=3)
    net.save_pretrained(tmp_path / "net")
    assert sorted(file.name for file in (tmp_path / "net").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "net/config.json").read_text(encoding="utf-8")) == {"width": 40, "depth": 2}
    again = Net.from_pretrained(tmp_path / "net")
    assert same(net, again) and not again.training
    readme = (tmp_path / "net/README.md").read_text(encoding="utf-8")
    assert "library_name: lightning-deepr" in readme and "| `body.1.weight` | 40 x 40 | 1,600 | 80 | 5.000% |" in readme
    assert huggingface_hub.ModelCard(readme).data.library_name == "lightning-deepr"
    (tmp_path / "net/model.safetensors").unlink()
    (tmp_path / "net/pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        Net.from_pretrained(tmp_path / "net")


def test_a_class_of_the_user_goes_to_the_hub_and_back(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    net = sparsify(Net(width=40), 0.05)
    url = net.push_to_hub("writer/net", private=True)
    assert hub.repositories["writer/net"].private and "/commit/" in url
    assert same(net, Net.from_pretrained("writer/net"))
    other = sparsify(Net(width=40), 0.1)
    pinned = hub.repositories["writer/net"].refs["main"]
    other.push_to_hub("writer/net")
    assert same(other, Net.from_pretrained("writer/net")) and same(net, Net.from_pretrained("writer/net", revision=pinned))
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubError, match=r"token with the right to write to `writer/net`"):
        net.push_to_hub("writer/net")
    with pytest.raises(HubError, match="expected the model repository `writer/other`"):
        Net.from_pretrained("writer/other")


class OwnLayer(nn.Linear, SparseHubMixin):
    def __init__(self, size: int = 20) -> None:
        super().__init__(size, 10)


def test_a_class_that_is_a_layer(tmp_path: Path) -> None:
    net = sparsify(OwnLayer(40), 0.1)  # torch makes a class of its own for such a module
    net.save_pretrained(tmp_path)
    assert "# OwnLayer\n" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert same(net, OwnLayer.from_pretrained(tmp_path))


def test_what_the_mixin_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Net has no converted weight.*PyTorchModelHubMixin for a dense one"):
        Net().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Net has no converted weight"):
        Net().push_to_hub("writer/net")
    sparsify(Net(), 0.1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="strict=False"):
        Net.from_pretrained(tmp_path, strict=False)
    with pytest.raises(ValueError, match="expected a weight of shape"):
        Net.from_pretrained(tmp_path, width=20)


# -- publish and load -----------------------------------------------------------------------------------------------------------


def lenet(seed: int = 0, connectivity: float = 0.02) -> nn.Module:
    torch.manual_seed(seed)
    return sparsify(LeNet300100(), connectivity, seed=seed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A model's file with what a trained one records."""
    return saved(lenet(), tmp_path / "lenet300_100.test.safetensors")


def saved(net: nn.Module, path: Path) -> Path:
    metrics = {"test_accuracy": {"value": 0.97, "mean": 0.969, "std": 0.001, "seeds": [0, 1, 2]}}
    zoo.save(
        net,
        path,
        architecture="lenet300_100",
        algorithm="DeepR",
        seeds=[0],
        metrics=metrics,
        data={"name": "MNIST", "split": "test"},
        recipe={"name": "mnist_best", "overrides": []},
        license="Apache-2.0",
    )
    return path


@pytest.fixture
def writer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub


def test_published_and_loaded_again(writer: HubServer, file: Path) -> None:
    made = publish(file, MODEL, private=True)
    content = file.read_bytes()
    assert made.sha256 == hashlib.sha256(content).hexdigest() and made.repo_id == MODEL and made.revision in made.url
    repository = writer.repositories[MODEL]
    assert repository.private and repository.refs["main"] == made.revision
    files = repository.commits[made.revision]
    assert sorted(files) == [
        ".gitattributes",
        "README.md",
        "config.json",
        "connectivity.png",
        "mnist_best.yaml",
        "model.safetensors",
    ]
    assert files["model.safetensors"] == Stored(content, True)
    config = json.loads(files["config.json"].content)
    assert config["architecture"] == "lenet300_100" and config["sha256"] == made.sha256
    data = huggingface_hub.ModelCard(files["README.md"].content.decode()).data
    assert data.eval_results[0].metric_value == 0.97 and data.license == "apache-2.0"
    net = zoo.load(MODEL, source="hub")
    assert same(net, zoo.load(file)) and same(net, lenet()) and not net.training
    dense = zoo.load(MODEL, source="hub", dense=True)
    assert torch.equal(dense.fc1.weight, net.fc1.weight) and type(dense.fc1) is nn.Linear
    assert len(writer.asked(r"GET /[0-9a-f]{64}")) == 1  # the second load was the cache's


def test_an_update_and_the_old_revision(writer: HubServer, file: Path, tmp_path: Path) -> None:
    first = publish(file, MODEL)
    sent = len(writer.asked("PUT"))
    assert sent == 1
    assert publish(file, MODEL).revision == first.revision  # nothing is new: no commit, nothing sent
    assert len(writer.asked("PUT")) == sent
    other = saved(lenet(seed=1), tmp_path / "other.safetensors")
    second = publish(other, MODEL, commit_message="better")
    assert second.revision != first.revision
    assert same(zoo.load(MODEL, source="hub"), lenet(seed=1))
    assert same(zoo.load(MODEL, source="hub", revision=first.revision), lenet())
    asked = len(writer.requests)
    assert same(zoo.load(MODEL, source="hub", revision=first.revision), lenet())
    assert len(writer.requests) == asked  # pinned and in the cache: nothing was asked
    with pytest.raises(HubError, match=r"nobody else to write.*HTTP 412") as caught:
        publish(file, MODEL, parent_commit=first.revision)
    assert caught.value.reason == "conflict"


def test_a_branch_a_pull_request_and_a_card_of_ones_own(
    writer: HubServer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository_card = tmp_path / "card.md"
    repository_card.write_text("---\nlicense: mit\n---\n# mine\n", encoding="utf-8")
    publish(file, MODEL, card=repository_card, picture=False)
    repository = writer.repositories[MODEL]
    other = saved(lenet(seed=1), tmp_path / "other.safetensors")
    made = publish(other, MODEL, card=False, picture=False, revision="candidate")
    assert repository.refs["candidate"] == made.revision != repository.refs["main"]
    assert repository.commits[made.revision]["README.md"].content == repository_card.read_bytes()
    assert same(zoo.load(MODEL, source="hub", revision="candidate"), lenet(seed=1))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    request = publish(saved(lenet(seed=2), tmp_path / "more.safetensors"), MODEL, create_pr=True)
    assert "/discussions/" in request.url and repository.refs["refs/pr/1"] == request.revision
    assert same(zoo.load(MODEL, source="hub", revision="refs/pr/1"), lenet(seed=2))


def test_a_module_is_published_as_it_is(writer: HubServer) -> None:
    net = sparsify(Net(width=20), 0.1)
    publish(net, "writer/own", picture=False, description="Of my own.", license="mit")
    files = writer.repositories["writer/own"].commits[writer.repositories["writer/own"].refs["main"]]
    assert sorted(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert "Of my own." in files["README.md"].content.decode() and "module=Net()" in files["README.md"].content.decode()
    assert same(zoo.load("writer/own", source="hub", module=Net(width=20)), net)
    assert same(Net.from_pretrained("writer/own"), net)  # config.json has the arguments, too
    net.push_to_hub("writer/mixed")
    assert same(zoo.load("writer/mixed", source="hub", module=Net(width=20)), net)


def test_publishing_that_fails(writer: HubServer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged"):
        publish(tmp_path / "damaged.safetensors", MODEL)
    forged = bytearray(file.read_bytes())
    forged[-300:] = b"\xff" * 300  # places past the end, under a digest that is right
    (tmp_path / "forged.safetensors").write_bytes(sign(forged))
    with pytest.raises(ValueError, match="places"):
        publish(tmp_path / "forged.safetensors", MODEL, picture=False)
    with pytest.raises(ValueError, match=r"metadata .*with a module only"):
        publish(file, MODEL, license="mit")
    with pytest.raises(FileNotFoundError, match="recipe: expected a file"):
        publish(file, MODEL, recipe="nowhere.yaml")
    assert writer.requests == []
    with pytest.raises(HubError, match=r"token with the right to write to `someone/net`.*HTTP 403.*type `write`"):
        publish(file, "someone/net", picture=False)
    for pattern, status, reason in (
        ("POST /api/repos/create", 500, "server"),
        ("POST .*/preupload/", 429, "rate_limit"),
        (r"POST .*\.git/info/lfs", 503, "server"),
        ("PUT /", 500, "server"),
        ("POST .*/commit/", 500, "server"),
        ("POST .*/commit/", 413, "refused"),
    ):
        writer.fail(pattern, status)
        with pytest.raises(HubError, match=f"HTTP {status}") as caught:
            publish(file, MODEL, picture=False)
        assert (caught.value.reason, caught.value.status) == (reason, status)
        writer.faults.clear()
        if MODEL in writer.repositories:  # all or nothing
            assert [sorted(files) for files in writer.repositories[MODEL].commits.values()] == [[".gitattributes"]]
    assert same(zoo.load(publish(file, MODEL, picture=False).repo_id, source="hub"), lenet())
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match=r"a token that the Hub accepts.*HTTP 401"):
        publish(file, MODEL, picture=False)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"HTTP 401|found no token|expected a token") as caught:
        publish(file, MODEL, picture=False)
    assert caught.value.reason == "no_access"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as caught:
        publish(file, MODEL, picture=False)
    assert caught.value.reason == "offline"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    writer.close()
    huggingface_hub.utils.close_session()  # and what was kept alive
    with pytest.raises(HubError, match=r"expected to reach http://127.0.0.1"):
        publish(file, MODEL, picture=False)


def test_no_file_of_the_hub_is_executed(writer: HubServer, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    trap = pickle.dumps(Trap())
    repository = writer.repositories["writer/trap"] = Repository()
    config = json.dumps({"auto_map": {"AutoModel": "modeling.Net"}, "width": 30}).encode()
    small = {"config.json": Stored(config, False), "modeling.py": Stored(b"import nothing", False)}
    for content in (trap, b"PK\x03\x04" + trap, b"\x00" * 8 + trap):
        writer.large[hashlib.sha256(content).hexdigest()] = content
        repository.commit({"model.safetensors": Stored(content, True), "pytorch_model.bin": Stored(trap, False), **small})
        with pytest.raises(ValueError):
            zoo.load("writer/trap", source="hub")
        with pytest.raises(ValueError):
            Net.from_pretrained("writer/trap")
    repository.commit({"pytorch_model.bin": Stored(trap, False), **small})
    with pytest.raises(HubError, match="a repository without it"):
        Net.from_pretrained("writer/trap")
    assert not (tmp_path / "sprung").exists() and writer.asked("pytorch_model|modeling") == []
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # it would have


def test_names_without_an_owner(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        zoo.load("lenet300_100.deepr_1pct_mnist", source="hub")


# -- by the environment, in a process of its own --------------------------------------------------------------------------------


def run(hub: HubServer, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run([sys.executable, *arguments], env={**kept, **own}, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow  # a process of its own
def test_the_endpoint_of_the_environment(hub: HubServer, file: Path, tmp_path: Path) -> None:
    command = ("-m", "lightning_deepr.cli", "zoo")
    done = run(hub, tmp_path, *command, "publish", str(file), MODEL, "--private", HF_TOKEN="hf_writer")
    assert done.returncode == 0, done.stderr
    assert f"revision {hub.repositories[MODEL].refs['main']}" in done.stdout
    assert hub.repositories[MODEL].private


def test_the_command_line(
    writer: HubServer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["zoo", "publish", str(file), MODEL, "--private", "--message", "a first one"])
    revision = writer.repositories[MODEL].refs["main"]
    assert f"revision {revision}\nsha256   {hashlib.sha256(file.read_bytes()).hexdigest()}" in capsys.readouterr().out
    main(["zoo", "publish", str(file), MODEL, "--revision", "candidate", "--keep-card"])
    target = tmp_path / "new/pulled.safetensors"
    main(["zoo", "pull", MODEL, "--output", str(target)])
    assert f"revision {revision}" in capsys.readouterr().out and target.read_bytes() == file.read_bytes()
    main(["zoo", "pull", MODEL])
    assert str(tmp_path / "cache") in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"zoo pull: .*expected sha256 00"):
        main(["zoo", "pull", MODEL, "--sha256", "00", "--output", str(tmp_path / "not")])
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "of somebody else"))
    with pytest.raises(SystemExit, match="zoo pull: expected the model repository"):
        main(["zoo", "pull", MODEL, "--output", str(tmp_path / "not")])
    with pytest.raises(SystemExit, match="zoo publish: expected a token with the right to write"):
        main(["zoo", "publish", str(file), MODEL])
    assert not (tmp_path / "not").exists()


@pytest.mark.slow  # a process of its own
def test_offline_by_the_environment(writer: HubServer, file: Path, tmp_path: Path) -> None:
    publish(file, MODEL, picture=False)
    zoo.load(MODEL, source="hub")
    asked = len(writer.requests)
    code = f"""
from lightning_deepr import zoo
print(type(zoo.load({MODEL!r}, source="hub")).__name__)
try:
    zoo.load("writer/other", source="hub")
except OSError as error:
    print(error)
"""
    done = run(writer, tmp_path, "-c", code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "LeNet300100" in done.stdout.splitlines()[0] and "since HF_HUB_OFFLINE=1 is set" in done.stdout
    assert len(writer.requests) == asked


def test_the_hub_is_imported_when_it_is_asked() -> None:
    code = "import sys, lightning_deepr; from lightning_deepr import zoo; zoo.list_models(); print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.stdout.strip() == "False", done.stderr
