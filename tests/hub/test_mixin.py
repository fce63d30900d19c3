"""A user's own class goes to a folder or to the Hub and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

huggingface_hub = pytest.importorskip("huggingface_hub")

from lightning_deepr import sparsify  # noqa: E402
from lightning_deepr.hub import HubError, SparseHubMixin  # noqa: E402
from tests.helpers.hub import Net, same  # noqa: E402
from tests.helpers.hub_server import HubServer  # noqa: E402

# the client warns about a library that it uses
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


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
    net = sparsify(OwnLayer(40), 0.1)  # torch derives a class for a parametrized module
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
