"""The Hub on loopback, and a model file for it."""

from __future__ import annotations

import time
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.hub_server import HubServer

if INSTALLED := find_spec("huggingface_hub") is not None:
    import huggingface_hub.file_download
    import huggingface_hub.utils


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Start a server, and give the client the settings that HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET make at import."""
    pytest.importorskip("huggingface_hub")
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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write a model's file with the metadata of a trained one."""
    from tests.helpers.hub import lenet, saved

    return saved(lenet(), tmp_path / "lenet300_100.test.safetensors")


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record how long the client would have waited before each new attempt."""
    slept: list[float] = []
    clock = types.SimpleNamespace(**{name: getattr(time, name) for name in dir(time) if not name.startswith("__")})
    clock.sleep = slept.append
    modules = (huggingface_hub.utils._http, huggingface_hub.file_download) if INSTALLED else ()
    for module in modules:
        monkeypatch.setattr(module, "time", clock)
    return slept
