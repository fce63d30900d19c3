"""Models are published to a loopback server with the Hub's API, and loaded again: from Python, commands and the environment."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

huggingface_hub = pytest.importorskip("huggingface_hub")

from lightning_deepr import sparsify, zoo  # noqa: E402
from lightning_deepr.commands.main import main  # noqa: E402
from lightning_deepr.files.container import sign  # noqa: E402
from lightning_deepr.hub import HubError, publish  # noqa: E402
from tests.helpers.hub import MODEL, Net, lenet, same, saved  # noqa: E402
from tests.helpers.hub_server import HubServer, Repository, Stored  # noqa: E402

# the client warns about a library that it uses
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


# -- publish and load ---------------------------------------------------------------------------------------------------------


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
        ".eval_results/lightning-deepr.yaml",
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
    (result,) = yaml.safe_load(files[".eval_results/lightning-deepr.yaml"].content)
    assert result == {"dataset": {"id": "ylecun/mnist", "task_id": "mnist"}, "value": 0.97, "notes": "test accuracy"}
    net = zoo.load(MODEL, source="hub")
    assert same(net, zoo.load(file)) and same(net, lenet()) and not net.training
    dense = zoo.load(MODEL, source="hub", dense=True)
    assert torch.equal(dense.fc1.weight, net.fc1.weight) and type(dense.fc1) is nn.Linear
    assert len(writer.asked(r"GET /[0-9a-f]{64}")) == 1  # the second load came from the cache


def test_an_update_and_the_old_revision(writer: HubServer, file: Path, tmp_path: Path) -> None:
    first = publish(file, MODEL)
    sent = len(writer.asked("PUT"))
    assert sent == 1
    assert publish(file, MODEL).revision == first.revision  # nothing changed: no commit, no upload
    assert len(writer.asked("PUT")) == sent
    other = saved(lenet(seed=1), tmp_path / "other.safetensors")
    second = publish(other, MODEL, commit_message="better")
    assert second.revision != first.revision
    assert same(zoo.load(MODEL, source="hub"), lenet(seed=1))
    assert same(zoo.load(MODEL, source="hub", revision=first.revision), lenet())
    asked = len(writer.requests)
    assert same(zoo.load(MODEL, source="hub", revision=first.revision), lenet())
    assert len(writer.requests) == asked  # pinned and in the cache: no request
    with pytest.raises(HubError, match=r"nobody else to write.*HTTP 412") as caught:
        publish(file, MODEL, parent_commit=first.revision)
    assert caught.value.reason == "conflict"


def test_a_branch_a_pull_request_and_a_card_of_ones_own(
    writer: HubServer, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository_card = tmp_path / "card.md"
    repository_card.write_text("---\nlicense: mit\n---\n# mine\n")
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
    forged[-300:] = b"\xff" * 300  # places past the end, with a right digest
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
    huggingface_hub.utils.close_session()  # and the connections that it keeps open
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
    assert (tmp_path / "sprung").exists()  # unpickling it would have executed it


def test_names_without_an_owner(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        zoo.load("lenet300_100.deepr_1pct_mnist", source="hub")


# -- by the environment, in a process of its own ------------------------------------------------------------------------------


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
    command = ("-m", "lightning_deepr.commands.main", "zoo")
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
from lightning_deepr import zoo  # noqa: E402
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
    code = (
        "import sys, lightning_deepr; from lightning_deepr import zoo; zoo.list_models(); "
        "print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.stdout.strip() == "False", done.stderr
