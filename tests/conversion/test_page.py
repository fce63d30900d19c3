"""The YAML of docs/connectivity.md works. (tests/docs runs the page's code.)"""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_deepr import Band, Dale, DeepR
from tests.helpers.paths import ROOT

ArgumentParser = pytest.importorskip("jsonargparse").ArgumentParser

PAGE = (ROOT / "docs" / "connectivity.md").read_text(encoding="utf-8")


def instantiate(parser: Any, parsed: Any) -> Any:
    return parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_yaml_of_the_page_makes_the_callback() -> None:
    (block,) = blocks("yaml")
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    parsed = parser.parse_object(yaml.safe_load(block))
    (callback,) = instantiate(parser, parsed).callbacks
    assert isinstance(callback, DeepR) and callback.connectivity == {"fc1": "nonzero", "fc2": 0.1}
    assert callback.candidates == {"fc1": Band(30)} and isinstance(callback.signs["fc2"], Dale)
    assert callback.signs["fc2"].excitatory == 0.8
    again = ArgumentParser()
    again.add_argument("--callbacks", type=list[Callback])
    text = parser.dump(parsed)
    assert isinstance(instantiate(again, again.parse_string(text)).callbacks[0], DeepR)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("0.05", 0.05),
        ("2662", 2662),
        ("nonzero", "nonzero"),
        ("{class_path: lightning_deepr.Topology, init_args: {source: lenet300_100.deepr_1pct_mnist}}", "Topology"),
    ],
)
def test_a_connectivity_on_the_command_line(given: str, wanted: Any) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(DeepR, "deepr")
    made = instantiate(parser, parser.parse_args([f"--deepr.connectivity={given}"])).deepr
    found = made.connectivity
    assert type(found).__name__ == wanted if wanted == "Topology" else (found == wanted and type(found) is type(wanted))
    given = "{class_path: lightning_deepr.NoSelf}"
    made = instantiate(parser, parser.parse_args(["--deepr.connectivity=0.1", f"--deepr.candidates={given}"])).deepr
    net = made.prepare(nn.Linear(10, 10))
    assert not bool((net.weight.detach() + 0).diagonal().any())
