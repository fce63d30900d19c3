"""Adapters are published to a loopback server with the Hub's API, and loaded again upon the network that they belong to."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

huggingface_hub = pytest.importorskip("huggingface_hub")

import lightning_deepr.hub  # noqa: E402
from lightning_deepr import adapt, save_adapter  # noqa: E402
from lightning_deepr.adapters import adapter_of, detach  # noqa: E402
from lightning_deepr.hub import HubError, load_adapter, publish_adapter  # noqa: E402
from lightning_deepr.hub.adapters import adapter_card  # noqa: E402
from lightning_deepr.zoo import FormatError  # noqa: E402
from tests.helpers.hub_server import HubServer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
REPO, BASE = "writer/rotated", "writer/base"


@pytest.fixture
def writer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4))


def adapted(seed: int = 1, trainable: tuple[str, ...] = ("biases",)) -> nn.Module:
    """Make an adapter whose values are not 0, and biases that differ from the pretrained ones."""
    net = adapt(network(), 0.1, trainable=trainable, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.uniform_(0.1, 1)
    return net


def test_published_and_loaded_again(writer: HubServer, tmp_path: Path) -> None:
    net, x = adapted(), torch.randn(5, 20)
    path = save_adapter(net, tmp_path / "mine.safetensors")
    made = publish_adapter(
        path, REPO, base_model=BASE, license="Apache-2.0", private=True, data={"name": "MNIST", "split": "rotated"},
        metrics={"test_accuracy": {"value": 0.9, "mean": 0.89, "std": 0.01, "seeds": [1, 2]}}, description="Turned digits.",
    )  # fmt: skip
    repository = writer.repositories[REPO]
    files = repository.commits[made.revision]
    assert repository.private and sorted(files) == [".gitattributes", "README.md", "adapter.safetensors", "config.json"]
    assert files["adapter.safetensors"].content == path.read_bytes()
    assert made.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    config = json.loads(files["config.json"].content)
    assert config["library_name"] == "lightning-deepr" and config["base_model"] == BASE
    assert config["connections"] == adapter_of(net).count
    card = huggingface_hub.ModelCard(files["README.md"].content.decode())
    front = card.data.to_dict()
    assert front["library_name"] == "lightning-deepr" and front["base_model"] == BASE
    assert front["base_model_relation"] == "adapter" and front["license"] == "apache-2.0"
    assert front["datasets"] == ["ylecun/mnist"] and {"adapter", "sparse"} <= set(front["tags"])
    for said in (
        "Turned digits.",
        f"{adapter_of(net).count:,} connections in 288 weights",
        "0.89 ± 0.01",
        "`2.weight`",
        "`0.bias`",
    ):
        assert said in card.text, said
    for digest in adapter_of(net).digests.values():
        assert digest in card.text
    loaded = load_adapter(network(), REPO)
    assert torch.equal(loaded(x), net(x)) and adapter_of(loaded).is_same(adapter_of(net))
    assert torch.equal(detach(loaded)[0].weight, network()[0].weight)  # type: ignore[index]


def test_the_snippet_of_a_card(writer: HubServer) -> None:
    publish_adapter(adapted(), REPO, base_model=BASE)
    repository = writer.repositories[REPO]
    text = repository.commits[repository.refs["main"]]["README.md"].content.decode()
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"net": network()}
    exec(snippet, names)
    x = torch.randn(5, 20)
    torch.testing.assert_close(names["net"](x), adapted()(x))


def test_an_update_and_the_old_revision(writer: HubServer, tmp_path: Path) -> None:
    x, path = torch.randn(5, 20), save_adapter(adapted(1), tmp_path / "first.safetensors")
    first = publish_adapter(path, REPO)
    assert publish_adapter(path, REPO).revision == first.revision  # nothing changed: no commit
    second = publish_adapter(adapter_of(adapted(2)), REPO)
    assert second.revision != first.revision
    assert torch.equal(load_adapter(network(), REPO)(x), adapted(2)(x))
    assert torch.equal(load_adapter(network(), REPO, revision=first.revision)(x), adapted(1)(x))
    with pytest.raises(HubError, match="expected sha256") as caught:
        load_adapter(network(), REPO, sha256=first.sha256)
    assert caught.value.reason == "checksum"


def test_another_network_is_refused_and_stays_as_it_is(writer: HubServer) -> None:
    publish_adapter(adapted(), REPO)
    other = network(seed=7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"`0\.weight`: the adapter belongs to another network"):
        load_adapter(other, REPO)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_publishing_that_fails(writer: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base_model: expected a repository of the Hub"):
        publish_adapter(adapted(), REPO, base_model="a network of my own")
    with pytest.raises(ValueError, match="has no adapter"):
        publish_adapter(network(), REPO)
    damaged = bytearray(save_adapter(adapted(), tmp_path / "net.safetensors").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "net.safetensors").write_bytes(damaged)
    with pytest.raises(FormatError):
        publish_adapter(tmp_path / "net.safetensors", REPO)
    assert not writer.requests
    with pytest.raises(HubError) as caught:
        load_adapter(network(), "writer/nothing")
    assert caught.value.reason == "not_found"


def test_a_card_without_a_base_on_the_hub() -> None:
    adapter = adapter_of(adapted(trainable=()))
    text = adapter_card(adapter, "me/net")
    front = huggingface_hub.ModelCard(text).data.to_dict()
    assert "base_model" not in front and "base_model_relation" not in front and "license" not in front
    assert "Beside it" not in text and "Metrics" not in text and "## Licence" not in text
    assert re.search(r"A sparse difference to a pretrained network: \d+ connections", text)
    assert lightning_deepr.hub.load_adapter is load_adapter
